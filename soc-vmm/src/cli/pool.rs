//! `soc-vmm pool`.

use clap::Subcommand;

/// What is done with the pool of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum PoolVerb {
    /// Hands functions out to soc-vmm processes, by the configuration
    Serve,
    /// Lists the pool's functions, and who has them
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}
