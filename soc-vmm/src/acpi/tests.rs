use std::io::Write as _;
use std::process::{Command, Stdio};

use super::*;

fn config(cpus: u32) -> AcpiConfig {
    AcpiConfig { apic_ids: (0..cpus).collect(), serial_ports: 1, keyboard: true }
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
        assert_eq!(signatures, [b"XSDT", b"FACP", b"APIC"]);
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
    let sparse = AcpiConfig { apic_ids: vec![0, 0x100], serial_ports: 0, keyboard: false };
    let tables = AcpiTables::new(&sparse, 0x2000_0000).unwrap();
    let guest = Guest(&tables);
    let kinds: Vec<_> = self::structures(guest.find(b"APIC")).iter().map(|structure| structure[0]).collect();
    assert_eq!(kinds, [0, 9, 1, 2, 2, 4, 10]);
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
fn devices_are_told_as_configured() {
    let has = |config: &AcpiConfig, name: &[u8]| {
        let tables = AcpiTables::new(config, 0x2000_0000).unwrap();
        Guest(&tables).dsdt().windows(name.len()).any(|window| window == name)
    };
    for (serial, keyboard) in [(true, false), (false, true)] {
        let config = AcpiConfig { apic_ids: vec![0; 17], serial_ports: if serial { 2 } else { 0 }, keyboard };
        assert_eq!((has(&config, b"COM1"), has(&config, b"COM2")), (serial, serial));
        assert!(!has(&config, b"COM3"));
        assert_eq!(has(&config, b"PS2K"), keyboard);
        assert!(has(&config, b"C010") && !has(&config, b"C011"));
    }
}

/// ACPICA's own compiler takes the tables apart (Debian package acpica-tools); its warnings fail too. Where it is missing the test
/// says so and checks nothing.
#[test]
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn acpica_reads_the_tables() {
    let tables = AcpiTables::new(&config(300), 0x2000_0000).unwrap();
    let guest = Guest(&tables);
    let dir = tempfile::tempdir().unwrap();
    for (name, table) in [("dsdt", guest.dsdt()), ("facp", guest.find(b"FACP")), ("apic", guest.find(b"APIC"))] {
        let binary = dir.path().join(format!("{name}.aml"));
        std::fs::File::create(&binary).unwrap().write_all(table).unwrap();
        let iasl = |args: &[&str], file: &str| {
            Command::new("iasl").args(args).arg(file).current_dir(dir.path()).stdin(Stdio::null()).output()
        };
        let Ok(output) = iasl(&["-d"], &format!("{name}.aml")) else {
            eprintln!("skipped: iasl is not installed (apt-get install acpica-tools)");
            return;
        };
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{name}: {text}");
        for word in ["Error", "Warning", "Invalid", "Incorrect"] {
            assert!(!text.contains(word), "{name}: {text}");
        }
        if name == "dsdt" {
            let output = iasl(&["-p", "again"], "dsdt.dsl").unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
        }
    }
}
