//! What functions send their DMA and their messages by.

use std::sync::Arc;

use crate::interrupt::MessageSink;
use crate::iommu::Iommu;
use crate::memory::GuestMemory;
use crate::pci::{ConfigSpace, PIRQ_GSI, Requester, header, pirq_of};

/// What a machine's functions send their DMA and their messages by: through its IOMMU, if it has one.
pub struct Ways {
    messages: Arc<dyn MessageSink>,
    memory: Arc<dyn GuestMemory>,
    iommu: Option<Arc<Iommu>>,
}

/// The same for one function, which is to be known by this ID.
pub struct Way<'a> {
    /// The ID.
    pub requester: Requester,
    /// Where its messages go.
    pub messages: Box<dyn MessageSink + 'a>,
    /// Guest memory as it reaches it.
    pub memory: Arc<dyn GuestMemory>,
}

impl Ways {
    /// Those to `messages` and `memory`, past or through an IOMMU.
    pub fn new(messages: Arc<dyn MessageSink>, memory: Arc<dyn GuestMemory>, iommu: Option<Arc<Iommu>>) -> Self {
        Self { messages, memory, iommu }
    }

    /// The ways of one more function.
    pub fn of_function(&self) -> Way<'_> {
        let requester = Requester::default();
        let (messages, memory) = match &self.iommu {
            None => (Box::new(&*self.messages) as Box<dyn MessageSink>, self.memory.clone()),
            Some(iommu) => (iommu.messages_of(requester.clone(), &*self.messages), iommu.memory_of(requester.clone())),
        };
        Way { requester, messages, memory }
    }

    /// Guest memory past any IOMMU.
    pub fn memory(&self) -> Arc<dyn GuestMemory> {
        self.memory.clone()
    }

    /// Where there are no 8259s, whose inputs the register names by rights, it has the GSI: a guest that looks at nothing else finds its
    /// interrupt.
    pub fn show_line(&self, config: &mut ConfigSpace, slot: u8) {
        if self.iommu.is_some() {
            config.set(header::INTERRUPT_LINE, &[PIRQ_GSI as u8 + pirq_of(slot, 0) as u8]);
        }
    }
}
