//! Whether a guest can run here before all of its pages are there.

use nix::errno::Errno;

use crate::kvm::Userfault;

/// Opens what tells of faults in guest memory, as long as the shim has its privileges.
///
/// # Errors
/// Why there is nothing, in a sentence.
pub(super) fn open() -> Result<Userfault, String> {
    Userfault::open().map_err(|errno| {
        let why = match errno {
            Errno::EACCES | Errno::EPERM => {
                "host-kvm-shim may not open /dev/userfaultfd: run it as root or a user who may, or set vm.unprivileged_userfaultfd to 1"
            }
            Errno::ENOSYS => "the host's kernel has no userfaultfd: use one with CONFIG_USERFAULTFD",
            Errno::EINVAL => "the host's kernel tells of no faults in shared memory: use Linux 5.14 or newer",
            errno => errno.desc(),
        };
        format!("post-copy is not possible here, because {why}")
    })
}
