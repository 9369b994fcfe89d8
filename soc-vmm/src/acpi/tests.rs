use std::io::Write as _;
use std::process::{Command, Stdio};

use super::*;

fn config(cpus: u32) -> AcpiConfig {
    AcpiConfig { apic_ids: (0..cpus).collect(), serial_ports: 1, keyboard: true, ..AcpiConfig::default() }
}

/// A guest's view of the tables: what lies at an address.
struct Guest<'a>(&'a AcpiTables);

impl Guest<'_> {
    fn at(&self, addr: u64) -> &[u8] {
        let (start, bytes) = self
            .0
            .pieces()
            .find(|(start, bytes)| (*start..start + bytes.len() as u64).contains(&addr))
            .unwrap_or_else(|| panic!("nothing at {addr:#x}"));
        &bytes[usize::try_from(addr - start).unwrap()..]
    }

    /// The table at `addr`, its checksum checked.
    fn table(&self, addr: u64) -> &[u8] {
        let bytes = self.at(addr);
        let table = &bytes[..u32_at(bytes, 4) as usize];
        assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        table
    }

    /// XSDT, then what it names.
    fn tables(&self) -> Vec<&[u8]> {
        let rsdp = self.at(self.0.rsdp());
        let xsdt = self.table(u64_at(rsdp, 24));
        let entries = xsdt[36..].chunks_exact(8).map(|entry| self.table(u64_at(entry, 0)));
        std::iter::once(xsdt).chain(entries).collect()
    }

    fn find(&self, signature: &[u8; 4]) -> &[u8] {
        self.tables().into_iter().find(|table| table.starts_with(signature)).unwrap()
    }

    fn dsdt(&self) -> &[u8] {
        self.table(u64_at(self.find(b"FACP"), 140))
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The structures of a MADT.
fn structures(madt: &[u8]) -> Vec<&[u8]> {
    let mut rest = &madt[44..];
    let mut structures = Vec::new();
    while !rest.is_empty() {
        let (structure, after) = rest.split_at(rest[1].into());
        structures.push(structure);
        rest = after;
    }
    structures
}

#[test]
fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
    for cpus in [1, 8, 255, 256, 1024] {
        let tables = AcpiTables::new(&config(cpus), 0x2000_0000).unwrap();
        let guest = Guest(&tables);
        let rsdp = guest.at(tables.rsdp());
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp[..36])), (0, 0));
        let signatures: Vec<_> = guest.tables().iter().map(|table| table[..4].to_vec()).collect();
        assert_eq!(signatures, [b"XSDT", b"FACP", b"APIC", b"WAET"]);
        assert!(guest.dsdt().starts_with(b"DSDT"));
    }
}

#[test]
fn pieces_lie_at_the_end_of_low_ram() {
    let tables = AcpiTables::new(&config(4), 0x2000_0000).unwrap();
    assert_eq!(tables.start() % PAGE_SIZE, 0);
    assert_eq!(tables.nvs() + PAGE_SIZE, tables.start());
    let (start, bytes) = tables.pieces().last().unwrap();
    assert!(start + bytes.len() as u64 <= 0x2000_0000);
    assert!(0x2000_0000 - start - (bytes.len() as u64) < PAGE_SIZE);
}

#[test]
fn what_does_not_fit_is_refused() {
    let end = ONE_MIB + 0x4000;
    assert!(
        matches!(AcpiTables::new(&config(1024), end), Err(AcpiError::NoRoom { need, end: at }) if need > 0x4000 && at == end)
    );
    assert_eq!(AcpiTables::new(&config(1025), 0x2000_0000).unwrap_err(), AcpiError::TooManyProcessors { count: 1025 });
}

#[test]
fn fixed_hardware_is_where_the_devices_are() {
    let tables = AcpiTables::new(&config(1), 0x2000_0000).unwrap();
    let guest = Guest(&tables);
    let fadt = guest.find(b"FACP");
    assert_eq!(u64::from(u32_at(fadt, 36)), tables.nvs());
    assert!(guest.at(tables.nvs()).starts_with(b"FACS"));
    assert_eq!((fadt[46], u32_at(fadt, 48)), (9, 0xb2));
    assert_eq!([u32_at(fadt, 56), u32_at(fadt, 64), u32_at(fadt, 76)], [0x600, 0x604, 0x608]);
    assert_eq!([u64_at(fadt, 152), u64_at(fadt, 176), u64_at(fadt, 212)], [0x600, 0x604, 0x608]);
    assert_eq!((u64_at(fadt, 120), fadt[128]), (0xcf9, 0xf));
    let flags = u32_at(fadt, 112);
    assert_eq!(flags & 1 << 4, 0, "the power button is fixed hardware");
    assert_ne!(flags & 1 << 8, 0, "the PM timer has 32 bits");
    assert_ne!(flags & 1 << 10, 0, "there is a reset register");
    assert_eq!(flags & 1 << 20, 0, "not hardware-reduced");
}

#[test]
fn processors_beyond_254_are_x2apics() {
    let tables = AcpiTables::new(&config(300), 0x2000_0000).unwrap();
    let guest = Guest(&tables);
    let madt = guest.find(b"APIC");
    let structures = structures(madt);
    let of = |kind: u8| structures.iter().filter(move |structure| structure[0] == kind);
    assert_eq!((of(0).count(), of(9).count()), (255, 45));
    assert!(of(0).enumerate().all(|(uid, local)| (local[2], local[3]) == (uid as u8, uid as u8)));
    assert!(of(9).zip(255..).all(|(local, id)| (u32_at(local, 4), u32_at(local, 12)) == (id, id)));
    assert_eq!((of(4).count(), of(10).count()), (1, 1));

    // A large APIC ID alone, as sparse topologies give them.
    let sparse = AcpiConfig { apic_ids: vec![0, 0x100], serial_ports: 0, keyboard: false, ..AcpiConfig::default() };
    let tables = AcpiTables::new(&sparse, 0x2000_0000).unwrap();
    let guest = Guest(&tables);
    let kinds: Vec<_> = self::structures(guest.find(b"APIC")).iter().map(|structure| structure[0]).collect();
    assert_eq!(kinds, [0, 9, 1, 2, 2, 4, 10]);
}

#[test]
fn processors_that_are_not_there_yet_can_come() {
    let config = AcpiConfig { absent: [2, 298].into(), ..config(300) };
    let (with, without) =
        (AcpiTables::new(&config, 0x2000_0000).unwrap(), AcpiTables::new(&self::config(300), 0x2000_0000));
    let len = |tables: &AcpiTables| tables.pieces().map(|(at, bytes)| (at, bytes.len())).collect::<Vec<_>>();
    assert_eq!(len(&with), len(&without.unwrap()));
    let guest = Guest(&with);
    let flags = structures(guest.find(b"APIC")).into_iter().filter_map(|structure| match structure[0] {
        0 => Some(u32_at(structure, 4)),
        9 => Some(u32_at(structure, 8)),
        _ => None,
    });
    // Not enabled, online capable.
    let absent: Vec<_> = flags.enumerate().filter(|(_, flags)| *flags != 1).collect();
    assert_eq!(absent, [(2, 2), (298, 2)]);
}

#[test]
fn lines_that_differ_from_isa_are_told() {
    let tables = AcpiTables::new(&config(1), 0x2000_0000).unwrap();
    let guest = Guest(&tables);
    let overrides: Vec<_> =
        structures(guest.find(b"APIC")).into_iter().filter(|structure| structure[0] == 2).map(<[u8]>::to_vec).collect();
    assert_eq!(overrides, [[2, 10, 0, 0, 2, 0, 0, 0, 0, 0], [2, 10, 0, 9, 9, 0, 0, 0, 0b1101, 0]]);
}

#[test]
fn an_iommu_is_told_and_then_there_are_no_8259s() {
    let tables = |iommu| AcpiTables::new(&AcpiConfig { iommu, ..config(1) }, 0x2000_0000).unwrap();
    let (with, without) = (tables(true), tables(false));
    let flags = |tables: &AcpiTables| u32_at(Guest(tables).find(b"APIC"), 40);
    assert_eq!((flags(&with), flags(&without)), (0, 1));
    assert!(Guest(&without).tables().iter().all(|table| !table.starts_with(b"DMAR")));
    let guest = Guest(&with);
    let dmar = guest.find(b"DMAR");
    assert_eq!((dmar.len(), dmar[36], dmar[37]), (72, 47, 1));
    // One unit, of all functions, and of the I/O APIC as the MADT has it.
    let unit = &dmar[48..];
    assert_eq!((unit[..8].to_vec(), u64_at(unit, 8)), (vec![0, 0, 24, 0, 1, 0, 0, 0], 0xfed9_0000));
    assert_eq!(unit[16..], [3, 8, 0, 0, 0, 0xff, 0, 0]);
}

#[test]
fn devices_are_told_as_configured() {
    let has = |config: &AcpiConfig, name: &[u8]| {
        let tables = AcpiTables::new(config, 0x2000_0000).unwrap();
        Guest(&tables).dsdt().windows(name.len()).any(|window| window == name)
    };
    for (serial, keyboard) in [(true, false), (false, true)] {
        let config = AcpiConfig {
            apic_ids: vec![0; 17],
            serial_ports: if serial { 2 } else { 0 },
            keyboard,
            ..AcpiConfig::default()
        };
        assert_eq!((has(&config, b"COM1"), has(&config, b"COM2")), (serial, serial));
        assert!(!has(&config, b"COM3"));
        assert_eq!(has(&config, b"PS2K"), keyboard);
        assert!(has(&config, b"C010") && !has(&config, b"C011"));
    }
}

/// ACPICA's own compiler takes the tables apart (Debian package acpica-tools); its warnings fail too. Where it is missing the test
/// says so and checks nothing.
#[test]
fn acpica_reads_the_tables() {
    let mut acpi_hotplug = full();
    if let Some(pci) = &mut acpi_hotplug.pci {
        (pci.hotplug, pci.ecam) = (Hotplug::Acpi, None);
    }
    let absent = AcpiConfig { absent: (1..6).chain(290..300).collect(), ..full() };
    for config in [config(1), config(300), full(), acpi_hotplug, absent] {
        let tables = AcpiTables::new(&config, 0x2000_0000).unwrap();
        let guest = Guest(&tables);
        let mut all = guest.tables();
        all.extend([guest.dsdt(), guest.at(tables.nvs())]);
        for table in all {
            if !acpica_reads(table) {
                return;
            }
        }
    }
}

/// Whether ACPICA is there to read `table`.
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn acpica_reads(table: &[u8]) -> bool {
    let name = String::from_utf8_lossy(&table[..4]).to_lowercase();
    let dir = tempfile::tempdir().unwrap();
    let binary = dir.path().join(format!("{name}.aml"));
    std::fs::File::create(&binary).unwrap().write_all(&table[..u32_at(table, 4) as usize]).unwrap();
    let iasl = |args: &[&str], file: &str| {
        Command::new("iasl").args(args).arg(file).current_dir(dir.path()).stdin(Stdio::null()).output()
    };
    let Ok(output) = iasl(&["-d"], &format!("{name}.aml")) else {
        eprintln!("skipped: iasl is not installed (apt-get install acpica-tools)");
        return false;
    };
    let said = |output: &std::process::Output| {
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
    };
    let text = said(&output);
    assert!(output.status.success(), "{name}: {text}");
    for word in ["Error", "Warning", "Invalid", "Incorrect"] {
        assert!(!text.contains(word), "{name}: {text}");
    }
    if name == "dsdt" {
        let text = said(&iasl(&["-p", "again"], "dsdt.dsl").unwrap());
        assert!(text.contains("0 Errors, 0 Warnings, 0 Remarks"), "{text}");
    }
    true
}

/// A machine with everything.
fn full() -> AcpiConfig {
    let pci = PciConfig {
        low_end: 0x8000_0000,
        high_end: 0x1_8000_0000,
        ecam: Some((0xb000_0000, 0x1000_0000)),
        physical_bits: 40,
        ports: vec![PortConfig { devfn: 0x08, slot: 1 }, PortConfig { devfn: 0x11, slot: 2 }],
        hotplug: Hotplug::Native,
    };
    let node = |processors, memory, distances| NumaNode { processors, memory, distances };
    AcpiConfig {
        fw_cfg: true,
        pvpanic: true,
        pci: Some(pci),
        numa: vec![
            node(vec![0, 1], vec![(0, 0x8_0000), (0x10_0000, 0x7ff0_0000)], vec![10, 30]),
            node(vec![2, 299], vec![(0x1_0000_0000, 0x8000_0000)], vec![]),
        ],
        ..config(300)
    }
}

/// Places the files as firmware does: its memory is `high`, and the RSDP's `segment`.
fn run(files: &FirmwareTables, high: u64, segment: u64) -> (Vec<u8>, Vec<u8>) {
    let (mut tables, mut rsdp) = (Vec::new(), Vec::new());
    let file = |bytes: &[u8]| String::from_utf8(bytes.split(|b| *b == 0).next().unwrap().to_vec()).unwrap();
    for entry in files.script.chunks_exact(128) {
        let name = file(&entry[4..60]);
        let is_rsdp = name == RSDP_FILE;
        assert!(is_rsdp || name == TABLES_FILE, "{name}");
        let to = if is_rsdp { &mut rsdp } else { &mut tables };
        match u32_at(entry, 0) {
            1 => {
                assert!(to.is_empty());
                let (at, zone) = if is_rsdp { (segment, 2) } else { (high, 1) };
                assert_eq!((at % u64::from(u32_at(entry, 60)), entry[64]), (0, zone));
                to.clone_from(if is_rsdp { &files.rsdp } else { &files.tables });
            }
            2 => {
                assert_eq!(file(&entry[60..116]), TABLES_FILE);
                let (at, len) = (u32_at(entry, 116) as usize, entry[120] as usize);
                let mut wide = [0; 8];
                wide[..len].copy_from_slice(&to[at..at + len]);
                let sum = u64::from_le_bytes(wide) + high;
                to[at..at + len].copy_from_slice(&sum.to_le_bytes()[..len]);
            }
            3 => {
                let [at, start, len] = [60, 64, 68].map(|field| u32_at(entry, field) as usize);
                assert_eq!(to[at], 0);
                to[at] = sum(&to[start..start + len]).wrapping_neg();
            }
            command => panic!("command {command}"),
        }
    }
    (tables, rsdp)
}

#[test]
fn firmware_places_what_a_kernel_is_handed() {
    let config = full();
    let direct = AcpiTables::new(&config, 0x8000_0000).unwrap();
    let files = FirmwareTables::new(&config).unwrap();
    let (tables, rsdp) = run(&files, direct.nvs(), 0xf_5a40);
    let pieces: Vec<_> = direct.pieces().collect();
    assert_eq!(rsdp, pieces[0].1);
    assert_eq!(tables[..4096], *pieces[1].1);
    assert_eq!(tables[4096..], *pieces[2].1);
    let signatures: Vec<_> = Guest(&direct).tables().iter().map(|table| table[..4].to_vec()).collect();
    assert_eq!(signatures, [b"XSDT", b"FACP", b"APIC", b"WAET", b"MCFG", b"SRAT", b"SLIT"]);
    // Who knows 32-bit addresses alone finds the same.
    let guest = Guest(&direct);
    let rsdt = guest.table(u32_at(&rsdp, 16).into());
    let entries = rsdt[36..].chunks_exact(4).map(|entry| guest.table(u32_at(entry, 0).into())[..4].to_vec());
    assert_eq!(entries.collect::<Vec<_>>(), signatures[1..]);
    assert!(guest.table(u32_at(guest.find(b"FACP"), 40).into()).starts_with(b"DSDT"));
}

#[test]
fn files_tell_the_window_in_force_and_keep_their_length() {
    use std::sync::{Arc, Mutex};

    use crate::bus::Device;
    use crate::devices::fw_cfg::test_guest::Guest as Reader;

    let mut config = full();
    let ecam = Arc::new(Mutex::new(None));
    let now = ecam.clone();
    let mut reader = Reader::new(|builder| {
        let update = move |config: &mut AcpiConfig| config.pci.as_mut().unwrap().ecam = *now.lock().unwrap();
        add_files(builder, &config, update).unwrap()
    });
    let before = reader.files();
    for window in [None, Some((0xe000_0000, 0x1000_0000)), Some((0xc000_0000, 0x400_0000)), Some((1 << 40, 1 << 28))] {
        *ecam.lock().unwrap() = window;
        reader.device.reset();
        let mut file = |name| {
            let (key, len) = reader.file(name);
            reader.select(key);
            reader.read(len as usize)
        };
        let [tables, rsdp, mut script] = [TABLES_FILE, RSDP_FILE, LOADER_FILE].map(&mut file);
        config.pci.as_mut().unwrap().ecam = window;
        let expected = FirmwareTables::new(&config).unwrap();
        assert!(tables.starts_with(&expected.tables) && script.starts_with(&expected.script));
        assert!(tables[expected.tables.len()..].iter().chain(&script[expected.script.len()..]).all(|byte| *byte == 0));
        script.truncate(expected.script.len());
        let (tables, _) = run(&FirmwareTables { tables, rsdp, script }, 0x7ff0_0000, 0xf_0000);
        let at = |pattern: &[u8]| tables.windows(pattern.len()).position(|window| window == pattern);
        let told = at(b"MCFG").map(|at| (u64_at(&tables, at + 44), tables[at + 55]));
        let expected = match window {
            Some((base, len)) if base < 1 << 32 => Some((base, ((len >> 20) - 1) as u8)),
            _ => None,
        };
        assert_eq!(told, expected);
    }
    assert_eq!(reader.files(), before);
}

#[test]
fn windows_leave_out_configuration_space() {
    let mut pci = full().pci.unwrap();
    let windows = |pci: &PciConfig| pci.low_windows().collect::<Vec<_>>();
    assert_eq!(windows(&pci), [(0x8000_0000, 0xafff_ffff), (0xc000_0000, 0xfebf_ffff)]);
    pci.ecam = Some((0xe000_0000, 0x800_0000));
    assert_eq!(windows(&pci), [(0x8000_0000, 0xdfff_ffff), (0xe800_0000, 0xfebf_ffff)]);
    assert_eq!(pci.last_bus(), 127);
    pci.ecam = Some((0x8000_0000, 0x1000_0000));
    assert_eq!(windows(&pci), [(0x9000_0000, 0xfebf_ffff)]);
    // Nowhere, over RAM, over the I/O APIC, above 4 GiB, past the end of everything: not told.
    for ecam in [None, Some((0, 1 << 28)), Some((0xf000_0000, 1 << 28)), Some((1 << 40, 1 << 28)), Some((!0, 1 << 28))]
    {
        pci.ecam = ecam;
        assert_eq!(windows(&pci), [(0x8000_0000, 0xfebf_ffff)]);
        assert_eq!(pci.last_bus(), 255);
    }
    assert_eq!(pci.high_window(), Some((0x1_8000_0000, (1 << 40) - 1)));
    pci.physical_bits = 52;
    assert_eq!(pci.high_window(), Some((0x1_8000_0000, (1 << 46) - 1)));
    (pci.high_end, pci.physical_bits) = (1 << 36, 36);
    assert_eq!(pci.high_window(), None);
}

#[test]
fn nodes_own_their_processors_and_memory() {
    let tables = AcpiTables::new(&full(), 0x8000_0000).unwrap();
    let guest = Guest(&tables);
    let mut rest = &guest.find(b"SRAT")[48..];
    let mut seen = Vec::new();
    while !rest.is_empty() {
        let (structure, after) = rest.split_at(rest[1].into());
        seen.push(match structure[0] {
            0 => format!("apic {} in {}", structure[3], structure[2]),
            1 => format!("{:#x}+{:#x} in {}", u64_at(structure, 8), u64_at(structure, 16), u32_at(structure, 2)),
            2 => format!("x2apic {} in {}", u32_at(structure, 8), u32_at(structure, 4)),
            kind => panic!("{kind}"),
        });
        rest = after;
    }
    let expected = ["apic 0 in 0", "apic 1 in 0", "0x0+0x80000 in 0", "0x100000+0x7ff00000 in 0", "apic 2 in 1"];
    assert_eq!(seen[..5], expected);
    assert_eq!(seen[5..], ["x2apic 299 in 1", "0x100000000+0x80000000 in 1"]);
    assert_eq!(guest.find(b"SLIT")[36..], [2, 0, 0, 0, 0, 0, 0, 0, 10, 30, 20, 10]);
}
