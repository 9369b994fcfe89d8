//! Guest memory as the files that it is, for other processes to map: who has them reaches the guest without this process. So it is kept
//! account of who has them, and whether what he writes is logged.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::sys::eventfd::{EfdFlags, EventFd};
use pcie_function::MemoryFile;
use tokio::sync::watch;

use super::GuestLog;

/// A piece of guest-physical memory that is one piece of a file.
#[derive(Clone, Debug)]
pub struct RamFile {
    /// First guest-physical address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// The file, from the first byte's place on.
    pub file: MemoryFile,
}

impl RamFile {
    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.file.as_fd()
    }

    /// Whether all of `len` bytes at `addr` are its.
    pub fn has(&self, addr: u64, len: u64) -> bool {
        let from = addr.checked_sub(self.base);
        from.and_then(|from| from.checked_add(len)).is_some_and(|end| end <= self.len)
    }
}

/// Who borrows the files of guest memory, to lend them to somebody else: a device.
#[derive(Debug)]
pub struct Borrower {
    name: String,
    logs: AtomicBool,
    bell: EventFd,
}

impl Borrower {
    /// One of that name, who logs nothing.
    ///
    /// # Errors
    /// This process can have no more descriptors.
    pub fn new(name: &str) -> nix::Result<Self> {
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { name: name.to_owned(), logs: AtomicBool::new(false), bell })
    }

    /// Says whether what is written to memory that he borrows from now on is logged, when that is asked for.
    pub fn set_logs(&self, logs: bool) {
        self.logs.store(logs, Ordering::Relaxed);
    }

    /// Signalled when another log is asked for than the one that came with the files.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// The files of guest memory, by ascending addresses. As long as it lives, somebody may write there.
#[derive(Debug)]
pub struct RamFiles {
    /// The pieces.
    pub pieces: Vec<RamFile>,
    /// Where it is noted what is written, if that is asked for.
    pub log: Option<Arc<GuestLog>>,
    loan: Loan,
}

impl RamFiles {
    /// Whether they should be given back and borrowed anew: another log is asked for, or none.
    pub fn is_stale(&self) -> bool {
        self.loan.lender.account().era != self.loan.era
    }
}

/// Keeps account of who has guest memory's files.
#[derive(Debug)]
pub struct Lender {
    account: Mutex<Account>,
    changed: watch::Sender<Standing>,
}

#[derive(Debug, Default)]
struct Account {
    /// Whoever borrowed, and may again.
    known: Vec<Weak<Borrower>>,
    /// Borrowers, and the era of their loans.
    loans: Vec<(Arc<Borrower>, u64)>,
    log: Option<Arc<GuestLog>>,
    /// How often the log was changed.
    era: u64,
}

/// How many loans there are, and of those the ones from before the log was changed.
#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    all: usize,
    old: usize,
}

impl Default for Lender {
    fn default() -> Self {
        Self { account: Mutex::default(), changed: watch::Sender::new(Standing::default()) }
    }
}

impl Lender {
    /// Lends these.
    pub fn lend(self: &Arc<Self>, pieces: Vec<RamFile>, borrower: &Arc<Borrower>) -> RamFiles {
        let mut account = self.account();
        let era = account.era;
        account.loans.push((borrower.clone(), era));
        account.known.retain(|known| known.strong_count() > 0);
        if !account.known.iter().any(|known| known.as_ptr() == Arc::as_ptr(borrower)) {
            account.known.push(Arc::downgrade(borrower));
        }
        let log = account.log.clone();
        self.tell(&account);
        RamFiles { pieces, log, loan: Loan { borrower: borrower.clone(), era, lender: self.clone() } }
    }

    /// Asks for a log of what is written from now on, or for none; see [`Lender::caught_up`].
    pub fn set_log(&self, log: Option<Arc<GuestLog>>) {
        let mut account = self.account();
        (account.log, account.era) = (log, account.era + 1);
        self.tell(&account);
        for (borrower, _) in &account.loans {
            // A full counter is as good as a signalled one.
            let _ = borrower.bell.write(1);
        }
    }

    /// The log that is asked for.
    pub fn log(&self) -> Option<Arc<GuestLog>> {
        self.account().log.clone()
    }

    /// Who has the files now.
    pub fn debtors(&self) -> Vec<String> {
        self.account().loans.iter().map(|(borrower, _)| borrower.name.clone()).collect()
    }

    /// Who has the files now, or may borrow them again, and can't log what is written.
    pub fn silent(&self) -> Vec<String> {
        let account = self.account();
        let known = account.known.iter().filter_map(Weak::upgrade);
        let silent = known.filter(|borrower| !borrower.logs.load(Ordering::Relaxed));
        silent.map(|borrower| borrower.name.clone()).collect()
    }

    /// Waits until nobody has the files from before the last change of the log.
    pub async fn caught_up(&self) {
        // This side is there as long as anybody waits.
        let _ = self.changed.subscribe().wait_for(|standing| standing.old == 0).await;
    }

    /// Waits until nobody has the files.
    pub async fn settled(&self) {
        // As above.
        let _ = self.changed.subscribe().wait_for(|standing| standing.all == 0).await;
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, account: &Account) {
        let old = account.loans.iter().filter(|(_, era)| *era != account.era).count();
        self.changed.send_replace(Standing { all: account.loans.len(), old });
    }
}

#[derive(Debug)]
struct Loan {
    borrower: Arc<Borrower>,
    era: u64,
    lender: Arc<Lender>,
}

impl Drop for Loan {
    fn drop(&mut self) {
        let mut account = self.lender.account();
        let is_it = |loan: &(Arc<Borrower>, u64)| Arc::ptr_eq(&loan.0, &self.borrower) && loan.1 == self.era;
        if let Some(index) = account.loans.iter().position(is_it) {
            account.loans.swap_remove(index);
        }
        self.lender.tell(&account);
    }
}
