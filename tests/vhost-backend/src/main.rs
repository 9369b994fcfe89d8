//! `vhost-backend block FILE SOCKET [PLACE:COUNT]`, `vhost-backend net STREAM SOCKET`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match vhost_backend::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-backend: {error}");
            ExitCode::FAILURE
        }
    }
}
