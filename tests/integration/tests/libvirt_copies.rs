//! Debian's unmodified libvirtd has a domain's disks copied: to where its guest moves, and beside it.

use integration::libvirt::{Boot, Domain, Host, Pair, disk, image};
use payloads::virtio_blk::{Load, PIECE, WRITTEN, virtio_blk};
use serde_json::json;
use testbed::debian::instruments;
use testbed::libvirt::Libvirt;

const WRITER: &str = "writer";
/// Bytes of the disks that are copied, and what is in them: data, a hole, data.
const DISK: usize = 24 << 20;

/// Bytes that a qcow2 image has of its own or not at all: its default.
const CLUSTER: usize = 64 << 10;

fn content(seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; DISK];
    for (place, byte) in bytes.iter_mut().enumerate().filter(|(place, _)| *place < 5 << 20 || *place >= 20 << 20) {
        *byte = (place as u8).wrapping_mul(31).wrapping_add((place >> 12) as u8) ^ seed;
    }
    bytes
}

/// A domain that writes its disk without end, with a raw and a qcow2 disk, of which the other host has empty ones; the raw one, if it
/// is not to make that itself.
fn with_disks(pair: &Pair, has_raw: bool) {
    let Pair { here, there } = pair;
    here.libvirt.write(&image("vda.raw"), content(1)).unwrap();
    here.libvirt.write(&image("vdb.raw"), content(2)).unwrap();
    qemu_img(&["convert", "-O", "qcow2", &path(here, "vdb.raw"), &path(here, "vdb.qcow2")]);
    if has_raw {
        there.libvirt.write(&image("vda.raw"), vec![0xee; DISK]).unwrap();
    } else {
        // What a pool has known stays in its list.
        std::fs::remove_file(there.libvirt.path(&image("vda.raw"))).unwrap();
        there.virsh(&["pool-create-as", "images", "dir", "--target", Libvirt::IMAGES]);
    }
    qemu_img(&["create", "-q", "-f", "qcow2", &path(there, "vdb.qcow2"), &DISK.to_string()]);
    define(pair, vec![disk(&image("vda.raw"), "raw", "vda"), disk(&image("vdb.qcow2"), "qcow2", "vdb")]);
}

/// A domain that writes the first of its disks without end.
fn define(pair: &Pair, devices: Vec<String>) {
    let load = Load { write: true, depth: 8, count: 64, rounds: u32::MAX, sleeps: true };
    let kernel = pair.give("writer", virtio_blk(load).unwrap().file().1);
    let boot = Boot::Kernel { kernel, initrd: None, cmdline: None };
    pair.here.define(&Domain { devices, ..Domain::new(WRITER, boot) });
}

fn qemu_img(args: &[&str]) {
    let output = instruments().unwrap().command("usr/bin/qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Where a host's image is.
fn path(host: &Host, file: &str) -> String {
    host.libvirt.path(&image(file)).display().to_string()
}

/// What the raw disk has there is what was in it here, with what the guest has written to its begin since.
fn is_whole(host: &Host) {
    let disk = std::fs::read(path(host, "vda.raw")).unwrap();
    assert!(unwritten(&disk) == &content(1)[8 * PIECE as usize..], "what the guest never wrote is not what it was");
    assert!(of_qcow2(host, "vdb.qcow2") == content(2), "the qcow2 disk is not what it was");
}

/// What the guest never wrote of a disk whose begin it has written.
fn unwritten(disk: &[u8]) -> &[u8] {
    let (written, rest) = disk.split_at(8 * PIECE as usize);
    for (number, piece) in written.chunks(PIECE as usize).enumerate() {
        assert!(piece.iter().all(|byte| *byte == number as u8 | WRITTEN), "piece {number}: {:02x?}", &piece[..16]);
    }
    rest
}

/// What is in a qcow2 image, which is sound.
fn of_qcow2(host: &Host, file: &str) -> Vec<u8> {
    let (qcow2, raw) = (path(host, file), path(host, "check"));
    instruments().unwrap().check(qcow2.as_ref()).unwrap();
    qemu_img(&["convert", "-O", "raw", &qcow2, &raw]);
    std::fs::read(raw).unwrap()
}

#[test]
fn a_domain_moves_with_its_disks() {
    let Some(pair) = Pair::start() else { return };
    let ways = [&["--copy-storage-all"][..], &["--copy-storage-all", "--copy-storage-synchronous-writes"]];
    for (number, more) in ways.into_iter().enumerate() {
        with_disks(&pair, number == 0);
        pair.here.virsh(&["start", WRITER]);
        pair.move_by(WRITER, &[&Pair::TCP, more].concat());
        writes(&pair.there);
        pair.there.virsh(&["destroy", WRITER]);
        is_whole(&pair.there);
        pair.here.virsh(&["undefine", WRITER]);
    }
    pair.check_messages();
}

/// The other host's backing file is another one, which nobody would do: it shows that nothing of this one's is copied.
#[test]
fn what_is_in_a_backing_file_is_not_copied() {
    let Some(pair) = Pair::start() else { return };
    for (host, seed) in [(&pair.here, 3), (&pair.there, 4)] {
        host.libvirt.write(&image("base.raw"), content(seed)).unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &path(host, "vda.qcow2")]);
    }
    define(&pair, vec![disk(&image("vda.qcow2"), "qcow2", "vda")]);
    pair.here.virsh(&["start", WRITER]);
    writes(&pair.here);
    pair.move_by(WRITER, &[&Pair::TCP[..], &["--copy-storage-inc"]].concat());
    writes(&pair.there);
    pair.there.virsh(&["destroy", WRITER]);
    let disk = of_qcow2(&pair.there, "vda.qcow2");
    let (begun, rest) = unwritten(&disk).split_at(CLUSTER - 8 * PIECE as usize);
    assert!(begun == &content(3)[CLUSTER - begun.len()..CLUSTER], "what the guest began to write is not what it was");
    assert!(rest == &content(4)[CLUSTER..], "what the guest never wrote is not the other host's");
    pair.check_messages();
}

/// The guest writes there.
fn writes(host: &Host) {
    let writes = || {
        let stats = host.virsh(&["domstats", "--block", WRITER]);
        let count = stats.lines().find_map(|line| line.trim().strip_prefix("block.0.wr.reqs=")?.parse::<u64>().ok());
        count.unwrap_or(0)
    };
    let before = writes();
    // All of the places that it writes, more than once.
    host.waits("it writes", || writes() > before + 64);
}

#[test]
fn a_copy_of_disks_is_aborted_and_the_guest_stays() {
    let Some(pair) = Pair::start() else { return };
    with_disks(&pair, true);
    let here = &pair.here;
    here.virsh(&["start", WRITER]);
    let way = [&Pair::TCP[..], &["--copy-storage-all"]].concat();
    let mover = pair.begin_to_move(WRITER, &[&way[..], &["--bandwidth", "1"]].concat());
    let jobs = || here.qmp(WRITER, "query-block-jobs", json!({}));
    here.waits("disks are copied", || jobs().as_array().is_some_and(|jobs| jobs.iter().any(|job| job["offset"] != 0)));
    here.virsh(&["domjobabort", WRITER]);
    assert!(!pair.ends_to_move(mover));
    here.becomes(WRITER, "running");
    pair.leaves_nothing_there();
    here.waits("no job is left", || jobs() == json!([]));
    // A copy beside the move is kept, and a disk stays where it is.
    here.libvirt.write(&image("copy"), vec![0xee; DISK]).unwrap();
    let to = image("copy");
    let words = ["--format", "raw", "--reuse-external", "--transient-job", "--wait"];
    let copy = [&["blockcopy", WRITER, "vda", &to][..], &words].concat();
    here.virsh(&[&copy[..], &["--finish"]].concat());
    let copied = std::fs::read(here.libvirt.path(&to)).unwrap();
    let untouched = 8 * PIECE as usize..;
    assert!(copied[untouched.clone()] == content(1)[untouched], "the copy is not what the disk was");
    let why = here.virsh_fails(&[&copy[..], &["--pivot"]].concat());
    assert!(why.contains("stays on its image"), "{why}");
    here.virsh(&["blockjob", WRITER, "vda", "--abort"]);
    here.waits("no job is left", || jobs() == json!([]));
    // And then it goes after all.
    pair.move_by(WRITER, &way);
    pair.there.virsh(&["destroy", WRITER]);
    is_whole(&pair.there);
    pair.check_messages();
}
