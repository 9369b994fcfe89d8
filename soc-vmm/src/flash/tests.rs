mod moving;

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};

use proptest::prelude::*;

use super::*;
use crate::bus::{Access, Answer, Deferred, Device, LateAnswer, RequestId, Wake};

/// The arrays, and which of them are shown.
#[derive(Default)]
struct Arrays(Mutex<Vec<(Vec<u8>, bool)>>);

impl FlashMemory for Arrays {
    fn show_array(&self, bank: usize, on: bool, done: Option<Ticket>) {
        let mut arrays = self.0.lock().unwrap();
        assert_ne!(arrays[bank].1, on, "only changes are told");
        arrays[bank].1 = on;
        if let Some(ticket) = done {
            ticket.done(0);
        }
    }

    fn program(&self, bank: usize, offset: u64, bytes: &[u8]) {
        let at = usize::try_from(offset).unwrap();
        self.0.lock().unwrap()[bank].0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn fetch(&self, bank: usize, bytes: &mut [u8]) -> Result<(), MemoryError> {
        bytes.copy_from_slice(&self.0.lock().unwrap()[bank].0[..bytes.len()]);
        Ok(())
    }
}

#[derive(Debug)]
struct Asleep;

impl Wake for Asleep {
    fn wake(&self) {}
}

const LEN: usize = 4 * SECTOR as usize;

struct Guest {
    flash: Flash,
    arrays: Arc<Arrays>,
}

impl Guest {
    /// Four sectors of variables, then two of code, and what is behind.
    fn new(store: Option<(VariableStore, Vec<u8>)>) -> Self {
        let (store, bytes) = store.map_or((None, vec![0xff; LEN]), |(store, bytes)| (Some(store), bytes));
        let code: Vec<u8> = (0..2 * SECTOR).map(|at| at as u8).collect();
        let blank = |len| (vec![0; len], true);
        let arrays = Arc::new(Arrays(Mutex::new(vec![blank(bytes.len()), blank(code.len())])));
        let (variables, start) = place(bytes.len() as u64, code.len() as u64).unwrap();
        let banks = vec![
            Bank { base: variables, bytes, read_only: false, store },
            Bank { base: start, bytes: code, read_only: true, store: None },
        ];
        let flash = Flash::new(banks, arrays.clone(), Arc::new(Asleep));
        flash.fill();
        Self { flash, arrays }
    }

    fn write_wide(&mut self, offset: u64, len: u8, data: u64) {
        let (late, answers) = mpsc::channel::<LateAnswer>();
        let wake: Arc<dyn Wake> = Arc::new(Asleep);
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
        let access = Access { vcpu: 0, host_tsc: 0, len };
        if let Answer::Deferred = self.flash.write(&access, offset, data, reply) {
            assert!(matches!(answers.try_recv().unwrap().answer, Answer::Done(_)));
        }
    }

    fn write(&mut self, offset: u64, data: u8) {
        self.write_wide(offset, 1, data.into());
    }

    /// What the guest reads: the array where it is shown, else the device's answer.
    fn read(&mut self, offset: u64) -> u8 {
        let bank = usize::from(offset >= LEN as u64);
        {
            let arrays = self.arrays.0.lock().unwrap();
            if arrays[bank].1 {
                return arrays[bank].0[offset as usize - bank * LEN];
            }
        }
        let (late, _answers) = mpsc::channel();
        let wake: Arc<dyn Wake> = Arc::new(Asleep);
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
        let Answer::Done(value) = self.flash.read(&Access { vcpu: 0, host_tsc: 0, len: 1 }, offset, reply) else {
            panic!("a chip answers")
        };
        value as u8
    }

    fn shown(&self, bank: usize) -> bool {
        self.arrays.0.lock().unwrap()[bank].1
    }
}

#[test]
fn chips_end_at_four_gib_and_are_whole_sectors() {
    assert_eq!(place(0x8_4000, 0x37_c000), Ok((0xffc0_0000, 0xffc8_4000)));
    assert!(place(0x8_4001, 0x37_c000).unwrap_err().to_string().contains("variable store"));
    assert!(place(0x8_4000, 0).is_err());
    assert_eq!(place(!0xfff, 0x1000), Err(FlashError::TooLarge { len: u64::MAX }));
    let claims = Guest::new(None).flash.claims();
    assert_eq!((claims[0].base + claims[0].len, claims[1].base + claims[1].len), (claims[1].base, FOUR_GIB));
}

/// As OVMF's driver looks for a chip (edk2 OvmfPkg/QemuFlashFvbServicesRuntimeDxe).
#[test]
fn ovmf_finds_a_chip() {
    let mut guest = Guest::new(None);
    assert_eq!(guest.read(0), 0xff);
    guest.write(0, 0x50);
    assert_eq!(guest.read(0), 0xff);
    guest.write(0, 0x70);
    assert_eq!(guest.read(0), 0);
    guest.write(0, 0xff);
    assert_eq!(guest.read(0), 0xff);
    assert!(guest.shown(0));
}

/// As OVMF's driver erases and programs.
#[test]
fn sectors_are_erased_and_bytes_programmed() {
    let mut guest = Guest::new(None);
    for (at, byte) in b"hello".iter().enumerate() {
        let at = SECTOR + at as u64;
        guest.write(at, 0x10);
        guest.write(at, *byte);
        assert_eq!(guest.read(at), 0x80);
    }
    guest.write(SECTOR + 4, 0xff);
    assert_eq!((0..6).map(|at| guest.read(SECTOR + at)).collect::<Vec<_>>(), *b"hello\xff");
    guest.write(0, 0x40);
    guest.write(0, 7);
    guest.write(SECTOR + 3, 0x20);
    guest.write(SECTOR + 3, 0xd0);
    assert!(!guest.shown(0));
    assert_eq!(guest.read(0), 0x80);
    guest.write(SECTOR + 3, 0xff);
    assert_eq!((guest.read(0), guest.read(SECTOR)), (7, 0xff));
}

#[test]
fn an_erase_that_is_not_confirmed_does_not_happen() {
    let mut guest = Guest::new(None);
    guest.write(0, 0x10);
    guest.write(0, 1);
    guest.write(0, 0x20);
    guest.write(0, 0x12);
    assert!(guest.shown(0));
    assert_eq!(guest.read(0), 1);
}

#[test]
fn a_buffered_write_happens_at_its_confirmation() {
    let mut guest = Guest::new(None);
    guest.write(0x10, 0xe8);
    assert_eq!(guest.read(0x10), 0x80);
    guest.write(0x10, 1);
    guest.write_wide(0x10, 4, 0x0403_0201);
    guest.write_wide(0x14, 4, 0x0807_0605);
    guest.write(0x10, 0xd0);
    guest.write(0x10, 0xff);
    assert_eq!((0x10..0x19).map(|at| guest.read(at)).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8, 0xff]);
    guest.write(0x20, 0xe8);
    guest.write(0x20, 0);
    guest.write(0x20, 9);
    guest.write(0x20, 0);
    assert!(guest.shown(0));
    assert_eq!(guest.read(0x20), 0xff);
}

#[test]
fn a_chip_describes_itself() {
    let mut guest = Guest::new(None);
    guest.write(0x55, 0x98);
    let query: Vec<u8> = (0x10..0x36).map(|at| guest.read(at)).collect();
    assert_eq!(query[..7], *b"QRY\x01\x00\x31\x00");
    // 16 KiB, one region of four sectors of 4 KiB.
    assert_eq!((query[0x17], &query[0x1c..0x21]), (14, &[1, 3, 0, 0x10, 0][..]));
    assert_eq!(query[0x21..], *b"PRI10");
    guest.write(0, 0x90);
    assert_eq!((guest.read(0), guest.read(1)), (0, 0));
    guest.write(0, 0xff);
    assert!(guest.shown(0));
}

#[test]
fn code_stays_as_it_is() {
    let mut guest = Guest::new(None);
    let code = LEN as u64;
    guest.write(code + 5, 0x10);
    guest.write(code + 5, 0);
    assert_eq!(guest.read(code), 0x90);
    guest.write(code + 5, 0x20);
    guest.write(code + 5, 0xd0);
    assert_eq!(guest.read(code), 0xb0);
    // The other chip is not concerned.
    assert!(guest.shown(0) && !guest.shown(1));
    guest.flash.reset();
    assert!(guest.shown(1));
    assert_eq!(guest.read(code + 5), 5);
}

/// A store of four sectors, as a firmware volume says how long it is.
fn template() -> Vec<u8> {
    let mut bytes = vec![0xff; LEN];
    bytes[32..40].copy_from_slice(&(LEN as u64).to_le_bytes());
    bytes[40..44].copy_from_slice(b"_FVH");
    bytes
}

#[test]
fn what_the_guest_programs_is_in_the_file_when_the_flash_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (file, link) = (dir.path().join("store"), dir.path().join("link"));
    std::fs::write(&file, template()).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    symlink("store", &link).unwrap();
    for byte in [1, 2] {
        let mut guest = Guest::new(Some(VariableStore::open(&link).unwrap()));
        guest.write(SECTOR, 0x10);
        guest.write(SECTOR, byte);
        // Once left in read-array mode, once ended amid a write.
        if byte == 1 {
            guest.write(SECTOR, 0xff);
        }
        drop(guest);
        let mut expected = template();
        expected[SECTOR as usize] = byte;
        assert_eq!(std::fs::read(&file).unwrap(), expected);
    }
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o640);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left behind");
}

#[test]
fn a_store_has_one_vm() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store");
    std::fs::write(&file, template()).unwrap();
    let is_refused = || VariableStore::open(&file).unwrap_err().to_string().contains("another VM's");
    let mut guest = Guest::new(Some(VariableStore::open(&file).unwrap()));
    assert!(is_refused());
    let inode = || file.metadata().unwrap().ino();
    let first = inode();
    guest.write(0, 0x10);
    guest.write(0, 1);
    guest.write(0, 0xff);
    while inode() == first {
        std::thread::yield_now();
    }
    assert!(is_refused());
    drop(guest);
    assert!(VariableStore::open(&file).is_ok());
}

#[test]
fn a_guest_goes_on_where_its_file_can_not_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let gone = dir.path().join("gone");
    std::fs::create_dir(&gone).unwrap();
    let file = gone.join("store");
    std::fs::write(&file, template()).unwrap();
    let mut guest = Guest::new(Some(VariableStore::open(&file).unwrap()));
    std::fs::remove_dir_all(&gone).unwrap();
    for at in 0..3 {
        guest.write(at, 0x10);
        guest.write(at, 7);
        guest.write(at, 0xff);
        assert_eq!(guest.read(at), 7);
    }
    drop(guest);
    assert!(!file.exists());
}

#[test]
fn a_store_that_may_not_be_written_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store");
    std::fs::write(&file, template()).unwrap();
    let set = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    set(0o444);
    let text = VariableStore::open(&file).unwrap_err().to_string();
    assert!(text.contains("is read-only: make it writable"), "{text}");
    set(0o600);
    VariableStore::open(&file).unwrap();
}

#[test]
fn what_is_no_variable_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store");
    let refusal = |path: &Path| VariableStore::open(path).unwrap_err().to_string();
    assert!(refusal(&file).contains("can't be read"));
    assert!(refusal(dir.path()).contains("no regular file"));
    let mut long = template();
    long.extend([0; 0x1000]);
    let mut huge = template();
    huge.resize(FIRMWARE_MAX as usize + 1, 0);
    let cases = [
        (vec![], "is empty"),
        (template()[..LEN - 0x1000].to_vec(), "is truncated"),
        (template()[..LEN - 1].to_vec(), "is truncated"),
        (long, "is too long"),
        (huge, "more than any"),
        (vec![0; LEN], "is none"),
        (vec![1; 41], "is none"),
    ];
    for (bytes, why) in cases {
        std::fs::write(&file, bytes).unwrap();
        let text = refusal(&file);
        assert!(text.contains(why) && text.contains("OVMF_VARS") && !text.contains('\n'), "{text}");
    }
}

proptest! {
    #[test]
    fn an_array_that_is_shown_is_what_the_chip_holds(
        steps in prop::collection::vec(
            (0..6 * SECTOR, 1u8..=8, prop::sample::select(vec![
                0x00, 0x01, 0x10, 0x20, 0x40, 0x50, 0x60, 0x70, 0x90, 0x98, 0xd0, 0xe8, 0xf0, 0xff, 0x1234_5678_9abc_def0u64,
            ])),
            0..80,
        ),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("store");
        std::fs::write(&file, template()).unwrap();
        let mut guest = Guest::new(Some(VariableStore::open(&file).unwrap()));
        let code = guest.arrays.0.lock().unwrap()[1].0.clone();
        for (at, len, data) in steps {
            guest.write_wide(at, len, data);
            guest.read(at);
        }
        guest.flash.reset();
        prop_assert!(guest.shown(0) && guest.shown(1));
        let arrays = std::mem::take(&mut *guest.arrays.0.lock().unwrap());
        drop(guest);
        prop_assert_eq!(&arrays[1].0, &code);
        prop_assert_eq!(&std::fs::read(&file).unwrap(), &arrays[0].0);
    }
}
