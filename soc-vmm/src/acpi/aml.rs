//! AML (ACPI 6.5 §20) by pieces that are encoded at once, so that a piece owns what it holds.

use acpi_tables::aml::{
    Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Method, Name, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Return, Scope, Store, While,
};
use acpi_tables::{Aml, AmlSink};

/// Encoded AML.
#[derive(Clone, Debug)]
pub(super) struct Term(Vec<u8>);

impl Term {
    pub(super) fn of(aml: &dyn Aml) -> Self {
        let mut bytes = Vec::new();
        aml.to_aml_bytes(&mut bytes);
        Self(bytes)
    }

    pub(super) fn bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

impl Aml for Term {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn refs(terms: &[Term]) -> Vec<&dyn Aml> {
    terms.iter().map(|term| term as &dyn Aml).collect()
}

pub(super) fn path(name: &str) -> Path {
    Path::new(name)
}

pub(super) fn name(of: &str, value: &dyn Aml) -> Term {
    Term::of(&Name::new(path(of), value))
}

pub(super) fn scope(of: &str, children: &[Term]) -> Term {
    Term::of(&Scope::new(path(of), refs(children)))
}

pub(super) fn device(of: &str, children: &[Term]) -> Term {
    Term::of(&Device::new(path(of), refs(children)))
}

/// `_HID`, or `_CID`, of an EISA id.
pub(super) fn eisa(of: &str, id: &str) -> Term {
    name(of, &EISAName::new(id))
}

/// A method that no two threads run at once.
pub(super) fn method(of: &str, args: u8, body: &[Term]) -> Term {
    Term::of(&Method::new(path(of), args, true, refs(body)))
}

pub(super) fn package(elements: &[Term]) -> Term {
    Term::of(&Package::new(refs(elements)))
}

/// `_CRS` or `_PRS`.
pub(super) fn resources(of: &str, descriptors: &[Term]) -> Term {
    name(of, &ResourceTemplate::new(refs(descriptors)))
}

pub(super) fn when(predicate: &dyn Aml, body: &[Term]) -> Term {
    Term::of(&If::new(predicate, refs(body)))
}

/// `While`.
pub(super) fn again(predicate: &dyn Aml, body: &[Term]) -> Term {
    Term::of(&While::new(predicate, refs(body)))
}

pub(super) fn store(to: &dyn Aml, value: &dyn Aml) -> Term {
    Term::of(&Store::new(to, value))
}

pub(super) fn give(value: &dyn Aml) -> Term {
    Term::of(&Return::new(value))
}

/// A region of registers.
pub(super) fn region(of: &str, space: OpRegionSpace, offset: u32, len: u32) -> Term {
    Term::of(&OpRegion::new(path(of), space, &offset, &len))
}

/// Registers in a region, as wide as they are accessed; a gap has no name.
pub(super) fn fields(of: &str, access: FieldAccessType, entries: &[(Option<[u8; 4]>, usize)]) -> Term {
    let entry = |&(name, bits): &(Option<[u8; 4]>, usize)| match name {
        Some(name) => FieldEntry::Named(name, bits),
        None => FieldEntry::Reserved(bits),
    };
    let entries = entries.iter().map(entry).collect();
    Term::of(&Field::new(path(of), access, FieldLockRule::NoLock, FieldUpdateRule::Preserve, entries))
}

/// An Extended Interrupt descriptor (§6.4.3.6) of level-triggered, active-high, shared lines.
pub(super) fn shared_interrupts(lines: &[u32]) -> Term {
    const CONSUMER: u8 = 1 << 0;
    const SHARED: u8 = 1 << 3;
    let len = 2 + 4 * lines.len() as u16;
    let mut bytes = vec![0x89];
    bytes.extend(len.to_le_bytes());
    bytes.extend([CONSUMER | SHARED, lines.len() as u8]);
    bytes.extend(lines.iter().flat_map(|line| line.to_le_bytes()));
    Term::bytes(bytes)
}
