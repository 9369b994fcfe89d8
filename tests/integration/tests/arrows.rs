//! The arrows between the rooms of the house, and what the shim is made of, as `cargo metadata` sees them.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};

/// Which rooms a room may use (docs/design.md). Tests, benchmarks and xtask may use everything.
const ARROWS: &[(&str, &[&str])] = &[
    ("ioreq-ring", &[]),
    ("api-channel", &["ioreq-ring"]),
    ("pcie-function", &["ioreq-ring"]),
    ("pcie-function-card", &["ioreq-ring", "pcie-function"]),
    ("host-kvm-shim", &["api-channel", "ioreq-ring", "pcie-function"]),
    ("migration", &[]),
    ("soc-vmm", &["api-channel", "ioreq-ring", "migration", "pcie-function", "pcie-function-card"]),
];

/// Every package that ends up in the shim. What is not here needs a reason to come in.
const SHIM: &[&str] = &[
    "api-channel",
    "bitflags",
    "cfg-if",
    "host-kvm-shim",
    "ioreq-ring",
    "kvm-bindings",
    "kvm-ioctls",
    "libc",
    "memoffset",
    "nix",
    "pcie-function",
    "seccompiler",
    "vfio-bindings",
    "vmm-sys-util",
    "zerocopy",
];

/// Crates whose types follow the architecture of the build: the shim's alone. (So do the numbers of seccompiler's filters: of calls of the process itself.)
const HOST_ONLY: &[&str] = &["kvm-bindings", "kvm-ioctls"];

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"))
        .other_options(["--locked".into(), "--filter-platform".into(), "x86_64-unknown-linux-gnu".into()])
        .exec()
        .expect("cargo metadata reads this workspace")
}

fn id<'a>(metadata: &'a Metadata, name: &str) -> &'a PackageId {
    &metadata.workspace_packages().iter().find(|p| p.name == name).unwrap_or_else(|| panic!("no room {name}")).id
}

/// Direct dependencies that are linked in: no tests', no build scripts', no procedural macros.
fn linked<'a>(metadata: &'a Metadata, id: &PackageId) -> Vec<&'a PackageId> {
    let resolve = metadata.resolve.as_ref().expect("resolved");
    let node = resolve.nodes.iter().find(|node| node.id == *id).expect("a node a package");
    let normal = node.deps.iter().filter(|d| d.dep_kinds.iter().any(|k| k.kind == DependencyKind::Normal));
    normal.map(|dep| &dep.pkg).filter(|pkg| !metadata[*pkg].targets.iter().any(|t| t.is_proc_macro())).collect()
}

fn closure(metadata: &Metadata, name: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut next = vec![id(metadata, name)];
    while let Some(id) = next.pop() {
        if seen.insert(metadata[id].name.to_string()) {
            next.extend(linked(metadata, id));
        }
    }
    seen
}

#[test]
fn rooms_use_only_what_their_arrows_allow() {
    let metadata = metadata();
    let rooms: BTreeSet<_> = metadata.workspace_packages().iter().map(|p| p.name.to_string()).collect();
    for (room, allowed) in ARROWS {
        let used: Vec<_> = linked(&metadata, id(&metadata, room))
            .into_iter()
            .map(|id| metadata[id].name.to_string())
            .filter(|name| rooms.contains(name) && !allowed.contains(&name.as_str()))
            .collect();
        assert!(used.is_empty(), "{room} uses {used:?}, which no arrow allows");
    }
}

#[test]
fn the_shim_is_made_of_the_allowed_crates_alone() {
    let found = closure(&metadata(), "host-kvm-shim");
    let allowed: BTreeSet<_> = SHIM.iter().map(ToString::to_string).collect();
    let (more, gone): (Vec<_>, Vec<_>) = (found.difference(&allowed).collect(), allowed.difference(&found).collect());
    assert!(more.is_empty(), "new in the shim: {more:?}");
    assert!(gone.is_empty(), "on the list, but not in the shim: {gone:?}");
}

#[test]
fn guest_types_do_not_follow_the_build_outside_the_shim() {
    let metadata = metadata();
    for room in ["ioreq-ring", "api-channel", "migration", "soc-vmm"] {
        let direct: Vec<_> = linked(&metadata, id(&metadata, room))
            .into_iter()
            .map(|id| metadata[id].name.to_string())
            .filter(|name| HOST_ONLY.contains(&name.as_str()))
            .collect();
        assert!(direct.is_empty(), "{room} uses {direct:?}");
    }
}

#[test]
fn there_is_one_version_of_each_rust_vmm_crate() {
    let metadata = metadata();
    let mut versions: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for package in &metadata.packages {
        versions.entry(package.name.to_string()).or_default().insert(package.version.to_string());
    }
    let rust_vmm = ["vm-memory", "vmm-sys-util", "kvm-bindings", "kvm-ioctls", "vfio-bindings", "linux-loader"];
    for name in rust_vmm {
        assert_eq!(versions.get(name).map(BTreeSet::len), Some(1), "{name}: {:?}", versions.get(name));
    }
}
