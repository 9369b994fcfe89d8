//! Calls by what they are good for. Numbers are the architecture's; what only one of them has is at the end.

use nix::libc::{self, c_long};

/// Never called here, and worth a lot to whoever has taken this process over: other processes' memory, the kernel, mounts and namespaces, keys, the
/// machine's clock and name.
pub(super) const FOREIGN: &[c_long] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_move_pages,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_remap_file_pages,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];

/// Of kernels that nobody runs any more.
pub(super) const OBSOLETE: &[c_long] = &[libc::SYS_nfsservctl];

/// Change who this process is, and what it may do.
pub(super) const PRIVILEGES: &[c_long] = &[
    libc::SYS_capset,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setgid,
    libc::SYS_setgroups,
    libc::SYS_setregid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setreuid,
    libc::SYS_setuid,
];

/// Start programs. Processes and threads are started by the same call, which is looked at by its arguments.
pub(super) const SPAWN: &[c_long] = &[libc::SYS_execve, libc::SYS_execveat];

/// Where this process runs, and how urgently.
pub(super) const RESOURCES: &[c_long] = &[
    libc::SYS_ioprio_set,
    libc::SYS_mbind,
    libc::SYS_migrate_pages,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_set_mempolicy,
    libc::SYS_setpriority,
];

/// What only this architecture has.
#[cfg(target_arch = "x86_64")]
pub(super) mod own {
    use super::{c_long, libc};

    pub(in super::super) const FOREIGN: &[c_long] = &[libc::SYS_ioperm, libc::SYS_iopl, libc::SYS_modify_ldt];
    pub(in super::super) const OBSOLETE: &[c_long] = &[
        libc::SYS__sysctl,
        libc::SYS_afs_syscall,
        libc::SYS_epoll_ctl_old,
        libc::SYS_epoll_wait_old,
        libc::SYS_getpmsg,
        libc::SYS_putpmsg,
        libc::SYS_security,
        libc::SYS_sysfs,
        libc::SYS_tuxcall,
        libc::SYS_uselib,
        libc::SYS_ustat,
        libc::SYS_vserver,
    ];
    pub(in super::super) const SPAWN: &[c_long] = &[libc::SYS_fork, libc::SYS_vfork];
    /// From here on are numbers of another calling convention (x32), under which every call has one more.
    pub(in super::super) const FIRST_FOREIGN: Option<u32> = Some(0x4000_0000);
}

/// What only this architecture has: nothing, on those that Linux came to late.
#[cfg(not(target_arch = "x86_64"))]
pub(super) mod own {
    use super::c_long;

    pub(in super::super) const FOREIGN: &[c_long] = &[];
    pub(in super::super) const OBSOLETE: &[c_long] = &[];
    pub(in super::super) const SPAWN: &[c_long] = &[];
    pub(in super::super) const FIRST_FOREIGN: Option<u32> = None;
}
