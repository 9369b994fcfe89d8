use proptest::prelude::*;

use super::*;

fn parse(line: &[&str]) -> Result<Invocation, Failure> {
    Invocation::parse(std::iter::once("soc-vmm").chain(line.iter().copied()).map(OsString::from))
}

fn run(line: &[&str]) -> RunConfig {
    match parse(&[&["run"], line].concat()) {
        Ok(Invocation::Run(config)) => *config,
        other => panic!("{line:?} gives {other:?}"),
    }
}

fn refusal(line: &[&str]) -> String {
    let failure = parse(line).expect_err("accepted");
    assert_eq!(failure.status(), ExitStatus::Usage);
    let line = failure.to_string();
    assert!(!line.is_empty() && !line.contains(char::is_control), "{line:?}");
    line
}

#[test]
fn defaults_are_the_promised_ones() {
    let config = run(&["--kernel", "vmlinuz"]);
    assert_eq!(config.name.as_str(), format!("vm-{}", std::process::id()));
    assert_eq!((config.cpus, config.memory.size), (1, 512 << 20));
    assert_eq!(
        config.boot,
        BootSource::Kernel { kernel: "vmlinuz".into(), initrd: None, cmdline: "console=ttyS0".into() }
    );
    assert_eq!((config.serial, config.function, config.debugcon), (SerialSpec::Stdio, FunctionSpec::Local, None));
    assert!(!config.paused && !config.debug_exit && config.qmp.is_empty());
    assert!(config.iommu.is_none() && config.test_devices.is_empty());
}

#[test]
fn what_is_missing_is_shown_where_all_is() {
    let why = refusal(&["save", "web"]);
    assert!(why.ends_with("an argument is missing: say soc-vmm save [OPTIONS] <NAME|--qmp <SOCKET>> <FILE>"), "{why}");
    let why = refusal(&["migrate", "tcp:a:1"]);
    assert!(
        why.ends_with("an argument is missing: say soc-vmm migrate [OPTIONS] <URI> <NAME|--qmp <SOCKET>>"),
        "{why}"
    );
}

#[test]
fn a_place_and_a_name_that_changed_places_are_known() {
    for line in [&["web", "tcp:a:1"][..], &["--zstd", "web", "tcp:a:1"], &["web", "tcp:a:1", "--downtime", "9"]] {
        let why = refusal(&[&["migrate"], line].concat());
        assert!(why.ends_with("say soc-vmm migrate tcp:a:1 web"), "{why}");
    }
    for line in [&["web"][..], &["web", "defer"], &["web", "tcp:a"], &["--tls-hostname", "web", "tls:a:1"]] {
        assert!(!refusal(&[&["migrate"], line].concat()).contains("say soc-vmm migrate t"), "{line:?}");
    }
}

#[test]
fn everything_at_once() {
    let config = run(&[
        "--name",
        "web-1",
        "--cpus=8,sockets=2",
        "--cpu",
        "host,-avx2",
        "--cpu-affinity",
        "0=4,7=5",
        "--memory",
        "4G,hugepages=1G,node=0",
        "--kernel",
        "k",
        "--initrd",
        "i",
        "--cmdline",
        "-v root=/dev/vda",
        "--serial",
        "unix:/s",
        "--debugcon",
        "file:d",
        "--debug-exit",
        "--iommu",
        "intel",
        "--test-device",
        "edu",
        "--qmp",
        "unix:/a",
        "--qmp",
        "unix:/b",
        "--function",
        "pci:01:00.1",
        "--paused",
        "--log",
        "debug",
    ]);
    assert_eq!((config.name.as_str(), config.cpus, config.memory.node), ("web-1", 8, Some(0)));
    assert_eq!((config.topology.sockets(), config.topology.cores(), config.cpu.name()), (2, 4, "host"));
    assert_eq!(config.memory.hugepages, Some(HugePages::Size1G));
    assert_eq!(
        config.boot,
        BootSource::Kernel { kernel: "k".into(), initrd: Some("i".into()), cmdline: "-v root=/dev/vda".into() }
    );
    assert_eq!(config.qmp, [PathBuf::from("/a"), PathBuf::from("/b")]);
    assert_eq!(config.function.to_string(), "pci:0000:01:00.1");
    assert_eq!(config.log, LevelFilter::DEBUG);
    assert!(config.paused && config.debug_exit);
    assert_eq!((config.iommu, &config.test_devices[..]), (Some(IommuModel::Intel), &[TestDevice::Edu][..]));
    assert_eq!(run(&["--firmware", "bios"]).boot, BootSource::Firmware { code: "bios".into(), nvram: None });
}

#[test]
fn a_guest_is_kept_by_the_name_or_the_socket_of_its_vm() {
    let saved = |line: &[&str]| match parse(&[&["save"], line].concat()) {
        Ok(Invocation::Perform(Verb::Save { file, keep, detach: false }, target)) => (target, file, keep),
        other => panic!("{line:?} gives {other:?}"),
    };
    let named = || Target::Name("web".parse().unwrap());
    assert_eq!(saved(&["web", "f"]), (named(), "f".into(), None));
    assert_eq!(saved(&["web", "f", "--keep"]), (named(), "f".into(), Some(Keeps::Running)));
    assert_eq!(saved(&["--keep", "web", "f"]), (named(), "f".into(), Some(Keeps::Running)));
    assert_eq!(saved(&["web", "f", "--keep=paused"]), (named(), "f".into(), Some(Keeps::Paused)));
    assert_eq!(saved(&["f", "--qmp", "s"]), (Target::Socket("s".into()), "f".into(), None));
    for line in [&["web", "f", "--keep", "paused"], &["--keep", "paused", "web", "f"]] {
        assert_eq!(refusal(&[&["save"][..], line].concat()), "--keep paused: say --keep=paused");
    }
    for line in [&["save"][..], &["save", "f"], &["save", "web", "f", "--keep=off"]] {
        refusal(line);
    }
}

#[test]
fn a_clone_is_run_as_its_original_was() {
    let config = match parse(&["clone", "web", "--kernel", "k", "--name", "twin"]) {
        Ok(Invocation::Run(config)) => *config,
        other => panic!("{other:?}"),
    };
    let original = Some("web".parse().unwrap());
    assert_eq!(config, RunConfig { original, ..run(&["--kernel", "k", "--name", "twin", "--incoming", "defer"]) });
    let said = refusal(&["clone", "web", "--kernel", "k", "--incoming", "tcp::1"]);
    assert!(said.starts_with("--incoming: ") && said.contains("web"), "{said}");
    let said = refusal(&["clone", "--kernel", "k"]);
    assert!(said.ends_with("say soc-vmm clone <NAME> [OPTIONS]"), "{said}");
    assert!(refusal(&["clone", "web"]).contains("--kernel"));
}

#[test]
fn what_is_not_there_yet_is_refused_by_name() {
    assert_eq!(refusal(&["run", "--kernel", "k", "--vfio", "-x"]), "--vfio is not there yet");
    for (option, what) in [("--tpm", "TPM"), ("--secure-boot=on", "Secure Boot"), ("--smm", "System Management Mode")] {
        assert!(refusal(&["run", "--firmware", "f", option]).contains(&format!("has no {what}")), "{option}");
    }
    // QEMU's way of writing.
    for (first, said) in [
        ("-name", "-machine: it is needed"),
        ("-machine", "-machine: it needs 'type'"),
        ("-", "'-' is no option"),
        ("-hx", "-hx: there is no such option"),
        ("-S", "'guest=a' is no option"),
    ] {
        let refused = refusal(&[first, "guest=a"]);
        assert!(refused.contains(said), "{first}: {refused}");
    }
}

#[test]
fn refusals_name_the_option_and_the_reason() {
    let cases: [(&[&str], &[&str]); 22] = [
        (&[], &["--help"]),
        (&["run"], &["--kernel", "--firmware"]),
        (&["launch"], &["'launch'", "--help"]),
        (&["run", "--kernel", "k", "--firmware", "f"], &["--kernel", "--firmware"]),
        (&["run", "--firmware", "f", "--cmdline", "x"], &["--firmware", "--cmdline"]),
        (&["run", "--kernel", "k", "--cpus", "0"], &["--cpus", "0"]),
        (&["run", "--kernel", "k", "--cpus", "3000"], &["--cpus", "1024"]),
        (&["run", "--kernel", "k", "--cpus", "4,sockets=3"], &["--cpus", "4 vCPUs"]),
        (&["run", "--kernel", "k", "--cpu", "Skylake"], &["--cpu", "'Skylake'", "Skylake-Server"]),
        (&["run", "--kernel", "k", "--cpu", "host,+vmx"], &["--cpu", "'vmx'", "not carried"]),
        (&["run", "--kernel", "k", "--memory", "0"], &["--memory", "needs memory"]),
        (&["run", "--kernel", "k", "--memory", "1X"], &["--memory", "K, M or G"]),
        (&["run", "--kernel", "k", "--name", "a/b"], &["--name", "letters"]),
        (&["run", "--kernel", "k", "--cpu-affinity", "1=0"], &["--cpu-affinity", "vCPU 1"]),
        (&["run", "--kernel", "k", "--function", "pci:x"], &["--function", "0000:01:00.0"]),
        (&["run", "--kernel", "k", "--log", "loud"], &["--log", "loud"]),
        (&["run", "--kernel", "k", "--frob\n\x1b"], &["frob"]),
        (&["run", "--kernel", "k", "--iommu", "amd"], &["--iommu", "'amd'", "intel"]),
        (&["run", "--firmware", "f", "--iommu", "intel"], &["--iommu needs --kernel", "8259"]),
        (&["run", "--kernel", "k", "--test-device", "nil"], &["--test-device", "'nil'", "edu"]),
        (&["run", "--kernel", "k", "--test-device", "edu", "--test-device", "edu"], &["--test-device edu", "twice"]),
        (&["pause"], &["NAME"]),
    ];
    for (line, words) in cases {
        let said = refusal(line);
        for word in words {
            assert!(said.contains(word), "{line:?}: {said:?} lacks {word:?}");
        }
    }
    assert!(refusal(&["status", "a", "--qmp", "s"]).contains("cannot be used with"));
}

#[test]
fn commands_to_running_vms() {
    let named = Target::Name("a".parse().unwrap());
    assert_eq!(parse(&["status", "a"]), Ok(Invocation::Perform(Verb::Status { json: false }, named.clone())));
    assert_eq!(parse(&["powerdown", "a"]), Ok(Invocation::Perform(Verb::Powerdown, named)));
    assert_eq!(parse(&["quit", "--qmp", "/s"]), Ok(Invocation::Perform(Verb::Quit, Target::Socket("/s".into()))));
    assert_eq!(parse(&["list", "--json"]), Ok(Invocation::List { json: true }));
    assert_eq!(
        parse(&["host", "--function", "card:/c"]),
        Ok(Invocation::Host { function: FunctionSpec::Card("/c".into()), json: false })
    );
}

#[test]
fn devices_are_added_as_they_are_written_for_run() {
    let named = || Target::Name("a".parse().unwrap());
    for (words, verb) in [
        (["add-disk", "a", "file=d,,1,id=x"], Verb::AddDisk("file=d,,1,id=x".into())),
        (["add-net", "a", "stream=s"], Verb::AddNet("stream=s".into())),
        (["remove", "a", "x"], Verb::Remove { id: "x".into() }),
    ] {
        assert_eq!(parse(&words), Ok(Invocation::Perform(verb, named())));
    }
    let resize = |size| parse(&["resize", "a", "x", size]);
    assert_eq!(resize("2T"), Ok(Invocation::Perform(Verb::Resize { id: "x".into(), size: 2 << 40 }, named())));
    assert_eq!(resize("10"), Ok(Invocation::Perform(Verb::Resize { id: "x".into(), size: 10 << 20 }, named())));
    assert_eq!(parse(&["balloon", "a", "64M"]), Ok(Invocation::Perform(Verb::Balloon(64 << 20), named())));
    for size in ["0", "+1", "1P", "", "T", "16777216T", "9223372036854775808K"] {
        let line = refusal(&["resize", "a", "x", size]);
        assert!(line.contains("a size is a number of MiB"), "{line}");
    }
    assert_eq!(parse(&["add-cpu", "a"]), Ok(Invocation::Perform(Verb::AddCpu, named())));
    for (words, why) in [
        (["add-disk", "a", "d"], "a disk has file="),
        (["add-disk", "a", "file=d,id=1"], "an id is a letter"),
        (["add-net", "a", "mac=52:54:00:00:00:01"], "a network interface needs"),
    ] {
        let line = refusal(&words);
        assert!(line.contains(why), "{line}");
    }
}

#[test]
fn help_and_version_are_printed() {
    for (flag, text) in [("-h", "run"), ("--help", "list"), ("-V", env!("CARGO_PKG_VERSION")), ("--version", "soc-vmm")]
    {
        assert!(matches!(parse(&[flag]), Ok(Invocation::Print(shown)) if shown.contains(text)), "{flag}");
    }
    let Ok(Invocation::Print(help)) = parse(&["run", "--help"]) else { panic!("no help") };
    assert!(help.contains("--kernel") && !help.contains("--vfio"), "{help}");
}

proptest! {
    /// Any words: no panic, and a refusal is one line.
    #[test]
    fn any_words(words in prop::collection::vec(word(), 0..8)) {
        let line: Vec<&str> = words.iter().map(String::as_str).collect();
        if let Err(failure) = parse(&line) {
            prop_assert_eq!(failure.status(), ExitStatus::Usage);
            prop_assert!(!failure.to_string().contains(char::is_control));
            prop_assert!(!failure.to_string().is_empty());
        }
    }

    /// Any bytes in a word, UTF-8 or not.
    #[test]
    fn any_bytes(bytes in prop::collection::vec(1u8.., 0..16), option in word()) {
        use std::os::unix::ffi::OsStringExt;
        let args = ["soc-vmm".into(), "run".into(), "--kernel".into(), "k".into(), option.into(), OsString::from_vec(bytes)];
        if let Err(failure) = Invocation::parse(args) {
            prop_assert!(!failure.to_string().contains(char::is_control));
        }
    }
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => "run|host|list|status|quit|migrate|add-disk|add-net|remove",
        6 => "--(name|cpus|cpu|cpu-affinity|memory|kernel|initrd|cmdline|firmware|serial|debugcon|qmp|function|log|disk|iommu|test-device|json)",
        2 => "--(debug-exit|paused|help)|-h|-V|--",
        3 => "[0-9]{1,4}(,sockets=2)?|512M|host|intel|edu|EPYC,-avx|local|null|file:f|unix:s|pool|0=1",
        2 => ".{0,10}",
    ]
}
