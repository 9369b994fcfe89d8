//! The benchmark runs inside an emulated server, with both contenders beside it.

use bench::disk::UNITS;
use bench::kicks::kicks;
use bench::server;
use bench::turns::Extent;

#[test]
fn a_disk_of_both_inside_the_server() {
    if !testbed::machines_or_skip("a_disk_of_both_inside_the_server") {
        return;
    }
    let name = "server.disk.write.depth32".to_owned();
    let names = [name.clone(), kicks(&name)];
    let figures = server::measure(&names, Extent { runs: 1, requests: 320 }, &|line| eprintln!("{line}")).unwrap();
    assert_eq!(figures.iter().map(|figure| figure.name.as_str()).collect::<Vec<_>>(), names);
    for (figure, unit) in figures.iter().zip(UNITS) {
        assert_eq!((figure.unit.as_str(), figure.skipped.as_deref()), (unit, None), "{figure:?}");
        assert!(figure.ours.is_some() && figure.peers.contains_key("qemu"), "{figure:?}");
    }
    // 32 requests come with one kick, unless the device looks for more by itself.
    let most = figures[1].ours.unwrap().max;
    assert!(most <= 1.0 / 8.0, "{most} kicks a request");
}
