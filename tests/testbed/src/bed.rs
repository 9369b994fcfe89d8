//! A whole DPU server: the card, the host server it is plugged into, and, where it is asked for, an Arm SoC on its other
//! side.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::card::{Card, HOST_HOST, HOST_VM, SOC_HOST, SOC_VM};
use crate::fetch::{self, Arch};
use crate::machine::{Error, Machine};
use crate::protocol::Start;
use crate::server::ServerConfig;
use crate::soc::SocConfig;
use crate::{build, guest};

/// Where the shim lies in the server.
pub const SHIM: &str = "/bin/host-kvm-shim";
/// What a guest's RAM is called among the mappings of its shim. The kernel counts it as the shim's private memory, since the card
/// reaches it by other means than a mapping.
pub const GUEST_RAM: &str = "memfd:outboard-ram";
/// Where soc-vmm lies in the SoC, and in a server that has it.
pub const SOC_VMM: &str = "/bin/soc-vmm";
/// Where the guest's kernel lies there.
pub const GUEST_KERNEL: &str = "/guest/vmlinuz";
/// Where the guest's initramfs lies there.
pub const GUEST_INITRD: &str = "/guest/initrd";

/// The virtio-serial port of the SoC for the standard streams of the soc-vmm on function `number`, or of a server for those of its VM of
/// that number.
#[must_use]
pub fn soc_channel(number: u32) -> String {
    format!("soc-vmm-{number}")
}

/// How long the shims may take to offer their functions.
const OFFER_LIMIT: Duration = Duration::from_secs(120);

/// A DPU server to be started.
#[derive(Clone, Debug)]
pub struct BedConfig {
    /// Vm functions of the card.
    pub functions: u32,
    /// The host server; the card's functions and a shim for each of them are added to it.
    pub server: ServerConfig,
    /// Further arguments of every shim.
    pub shim_args: Vec<String>,
    /// The Arm SoC, if there is to be one; the card's functions, soc-vmm and the guest's image are added to it. Without it the
    /// card's SoC side is reached from this machine, by [`Card::soc_socket`].
    pub soc: Option<SocConfig>,
}

/// A running DPU server.
#[derive(Debug)]
pub struct Bed {
    // Dropped in this order: the machines before the card that they are clients of.
    /// The host server.
    pub server: Machine,
    /// The Arm SoC, if there is one.
    pub soc: Option<Machine>,
    /// The card.
    pub card: Card,
}

impl BedConfig {
    /// One server with `functions` vm functions, served from this machine.
    #[must_use]
    pub fn new(name: &str, functions: u32) -> Self {
        Self { functions, server: ServerConfig::new(name), shim_args: Vec::new(), soc: None }
    }

    /// Adds an Arm SoC.
    #[must_use]
    pub fn with_arm_soc(mut self) -> Self {
        let name = format!("{}-soc", self.server.basics.name);
        self.soc = Some(SocConfig::new(&name));
        self
    }

    /// Puts soc-vmm on the server as well, for so many VMs, and a guest whose kernel has the driver of a balloon: memory that no function pins. They run by
    /// [`crate::vmm::Vmm::run_on_the_server`].
    ///
    /// # Errors
    /// [`Error`].
    pub fn with_soc_vmm_on_the_server(mut self, vms: u32) -> Result<Self, Error> {
        let soc_vmm = build::programs(Arch::Amd64, &["soc-vmm"])?.remove(0);
        let image = guest::image_with_balloon()?;
        let basics = &mut self.server.basics;
        for (there, here) in [(SOC_VMM, soc_vmm), (GUEST_KERNEL, image.kernel), (GUEST_INITRD, image.initrd)] {
            basics.files.push((there.to_owned(), here));
        }
        basics.channels.extend((0..vms).map(soc_channel));
        Ok(self)
    }

    /// Fetches and builds everything that it takes, so that starting takes no longer than the machines do.
    ///
    /// # Errors
    /// [`Error`].
    pub fn prepare(&self) -> Result<(), Error> {
        build::programs(Arch::Amd64, &["testbed-init", "card", "host-kvm-shim", "soc-vmm"])?;
        if self.soc.is_some() {
            build::programs(Arch::Arm64, &["testbed-init", "soc-vmm"])?;
            fetch::kernel(Arch::Arm64)?;
        }
        guest::image()?;
        Ok(())
    }

    /// Starts the card, then the machines, and waits until the shims offer their functions.
    ///
    /// # Errors
    /// [`Error`].
    pub fn start(&self) -> Result<Bed, Error> {
        let card = Card::start(self.functions)?;
        let bed = Bed {
            server: self.server_on(&card)?.start()?,
            soc: match &self.soc {
                Some(soc) => Some(soc_on(soc.clone(), &card)?.start()?),
                None => None,
            },
            card,
        };
        bed.wait_until_offered()?;
        Ok(bed)
    }

    fn server_on(&self, card: &Card) -> Result<ServerConfig, Error> {
        let shim = build::programs(Arch::Amd64, &["host-kvm-shim"])?.remove(0);
        let mut server = self.server.clone();
        let basics = &mut server.basics;
        basics.cards = card.host_sockets();
        basics.files.push((SHIM.to_owned(), shim));
        basics.bind.extend([HOST_VM, HOST_HOST]);
        let mut args = vec!["--function".to_owned(), "pci:{}".to_owned()];
        args.extend(self.shim_args.iter().cloned());
        basics.start.extend([HOST_VM, HOST_HOST].map(|id| Start { id, program: SHIM.to_owned(), args: args.clone() }));
        Ok(server)
    }
}

impl Bed {
    /// A shim resets its function, then maps its mailbox for the card: from then on a SoC that attaches isn't cut off.
    fn wait_until_offered(&self) -> Result<(), Error> {
        let end = Instant::now() + OFFER_LIMIT;
        for number in 0..=self.card.functions() {
            while !self.card.is_offered(number)? {
                if Instant::now() >= end {
                    return Err(self.server.dead(&format!("doesn't offer function {number}")));
                }
                sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }
}

fn soc_on(mut soc: SocConfig, card: &Card) -> Result<SocConfig, Error> {
    let soc_vmm = build::programs(Arch::Arm64, &["soc-vmm"])?.remove(0);
    let image = guest::image()?;
    let basics = &mut soc.basics;
    basics.cards = card.soc_sockets();
    basics.files.extend([
        (SOC_VMM.to_owned(), soc_vmm),
        (GUEST_KERNEL.to_owned(), image.kernel),
        (GUEST_INITRD.to_owned(), image.initrd),
    ]);
    basics.bind.extend([SOC_VM, SOC_HOST]);
    basics.channels.extend((0..=card.functions()).map(soc_channel));
    Ok(soc)
}
