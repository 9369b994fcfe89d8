//! Which frames the guest's driver wants (virtio 1.2 §5.1.6.5.1 – §5.1.6.5.3).

use serde::{Deserialize, Serialize};

/// Bytes of an address.
pub(super) const ADDRESS: usize = 6;
/// Addresses of each kind that are kept; more are taken for all of that kind.
const TABLE: usize = 64;
/// VLANs that there are.
const VLANS: u16 = 4096;

/// What passes. A driver that has said nothing gets everything, as firmware does that knows no control queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// Every frame.
    pub(super) promiscuous: bool,
    /// Every frame to a group; to a station.
    pub(super) all_groups: bool,
    pub(super) all_stations: bool,
    /// None to a group, to a station, to everybody.
    pub(super) no_groups: bool,
    pub(super) no_stations: bool,
    pub(super) no_broadcast: bool,
    /// The interface's own address.
    pub(super) own: [u8; ADDRESS],
    stations: Table,
    groups: Table,
    /// A bit a VLAN; none: tags are not looked at.
    vlans: Option<Box<[u64; VLANS as usize / 64]>>,
}

/// Addresses; none: all of them.
type Table = Option<Vec<[u8; ADDRESS]>>;

/// A saved [`Filter`], field by field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FilterState {
    promiscuous: bool,
    all_groups: bool,
    all_stations: bool,
    no_groups: bool,
    no_stations: bool,
    no_broadcast: bool,
    own: [u8; ADDRESS],
    stations: Table,
    groups: Table,
    /// The VLANs that are in, by ascending numbers.
    vlans: Option<Vec<u16>>,
}

impl Filter {
    /// The filter after a reset.
    pub(super) fn new(own: [u8; ADDRESS], by_vlan: bool) -> Self {
        Self {
            promiscuous: true,
            all_groups: false,
            all_stations: false,
            no_groups: false,
            no_stations: false,
            no_broadcast: false,
            own,
            stations: Some(Vec::new()),
            groups: Some(Vec::new()),
            vlans: by_vlan.then(|| Box::new([0; VLANS as usize / 64])),
        }
    }

    /// What it is.
    pub(super) fn save(&self) -> FilterState {
        let has = |vlans: &[u64; VLANS as usize / 64], id: u16| vlans[usize::from(id / 64)] >> (id % 64) & 1 != 0;
        FilterState {
            promiscuous: self.promiscuous,
            all_groups: self.all_groups,
            all_stations: self.all_stations,
            no_groups: self.no_groups,
            no_stations: self.no_stations,
            no_broadcast: self.no_broadcast,
            own: self.own,
            stations: self.stations.clone(),
            groups: self.groups.clone(),
            vlans: self.vlans.as_ref().map(|vlans| (0..VLANS).filter(|id| has(vlans, *id)).collect()),
        }
    }

    /// The one that was saved, if a driver can have made it.
    pub(super) fn restored(state: FilterState, by_vlan: bool) -> Option<Self> {
        let fits = |table: &Table| table.as_ref().is_none_or(|table| table.len() <= TABLE);
        let FilterState { promiscuous, all_groups, all_stations, no_groups, no_stations, no_broadcast, .. } = state;
        let FilterState { own, stations, groups, vlans, .. } = state;
        if !fits(&stations) || !fits(&groups) || vlans.is_some() != by_vlan {
            return None;
        }
        let mut filter = Self { stations, groups, ..Self::new(own, by_vlan) };
        (filter.promiscuous, filter.all_groups, filter.all_stations) = (promiscuous, all_groups, all_stations);
        (filter.no_groups, filter.no_stations, filter.no_broadcast) = (no_groups, no_stations, no_broadcast);
        let all = vlans.into_iter().flatten().all(|id| filter.set_vlan(id, true));
        all.then_some(filter)
    }

    /// Whether the driver wants that frame.
    pub(super) fn accepts(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<ADDRESS>().filter(|_| !self.promiscuous) else { return true };
        let listed = |table: &Table| table.as_ref().is_none_or(|table| table.contains(to));
        let to_us = if *to == [0xff; ADDRESS] {
            !self.no_broadcast
        } else if to[0] & 1 != 0 {
            !self.no_groups && (self.all_groups || listed(&self.groups))
        } else {
            !self.no_stations && (self.all_stations || *to == self.own || listed(&self.stations))
        };
        to_us && self.accepts_vlan(frame)
    }

    fn accepts_vlan(&self, frame: &[u8]) -> bool {
        let (Some(vlans), Some([0x81, 0x00, high, low])) = (&self.vlans, frame.get(12..16)) else { return true };
        let id = u16::from_be_bytes([*high, *low]) & (VLANS - 1);
        // The tag of VLAN 0 is a priority and no VLAN.
        id == 0 || vlans[usize::from(id / 64)] >> (id % 64) & 1 != 0
    }

    /// Adds a VLAN or takes it out; false: there is none of that number.
    pub(super) fn set_vlan(&mut self, id: u16, wanted: bool) -> bool {
        let Some(vlans) = self.vlans.as_mut().filter(|_| id < VLANS) else { return false };
        let (word, bit) = (&mut vlans[usize::from(id / 64)], 1 << (id % 64));
        *word = if wanted { *word | bit } else { *word & !bit };
        true
    }

    /// Takes both tables: each a count in 4 bytes and so many addresses. False: that is not what they are.
    pub(super) fn set_tables(&mut self, data: &[u8]) -> bool {
        let Some((stations, rest)) = table(data) else { return false };
        let Some((groups, [])) = table(rest) else { return false };
        (self.stations, self.groups) = (stations, groups);
        true
    }
}

fn table(data: &[u8]) -> Option<(Table, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = u32::from_le_bytes(*count) as usize;
    let (addresses, rest) = rest.split_at_checked(count.checked_mul(ADDRESS)?)?;
    let addresses = addresses.as_chunks::<ADDRESS>().0;
    Some(((count <= TABLE).then(|| addresses.to_vec()), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [3, 0, 0, 0, 0, 3];
    const ALL: [u8; 6] = [0xff; 6];

    fn frame(to: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
        let mut frame = [to, OTHER].concat();
        if let Some(id) = vlan {
            frame.extend([0x81, 0]);
            // With a priority before it.
            frame.extend((id | 0xe000).to_be_bytes());
        }
        frame.extend([8, 0, 0x45]);
        frame
    }

    fn tables(stations: &[[u8; 6]], groups: &[[u8; 6]]) -> Vec<u8> {
        let table = |list: &[[u8; 6]]| [&(list.len() as u32).to_le_bytes()[..], &list.concat()].concat();
        [table(stations), table(groups)].concat()
    }

    fn accepted(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, ALL].map(|to| filter.accepts(&frame(to, None)))
    }

    #[test]
    fn who_passes() {
        let all = Filter::new(OWN, false);
        let own = Filter { promiscuous: false, ..all.clone() };
        assert_eq!((accepted(&all), accepted(&own)), ([true; 4], [true, false, false, true]));
        assert_eq!(accepted(&Filter { all_groups: true, ..own.clone() }), [true, false, true, true]);
        assert_eq!(accepted(&Filter { all_stations: true, ..own.clone() }), [true, true, false, true]);
        let mut listed = own.clone();
        assert!(listed.set_tables(&tables(&[OTHER], &[GROUP])));
        assert_eq!(accepted(&listed), [true; 4]);
        assert_eq!(accepted(&Filter { no_groups: true, ..listed.clone() }), [true, true, false, true]);
        assert_eq!(accepted(&Filter { no_stations: true, ..listed.clone() }), [false, false, true, true]);
        assert_eq!(accepted(&Filter { no_broadcast: true, ..listed.clone() }), [true, true, true, false]);
        assert!(own.accepts(&[1, 2, 3]), "what has no address is the driver's to judge");
    }

    #[test]
    fn tables_are_what_they_say() {
        let good = tables(&[OTHER], &[GROUP]);
        let mut filter = Filter::new(OWN, false);
        let before = filter.clone();
        for end in 0..good.len() {
            assert!(!filter.set_tables(&good[..end]), "{end}");
        }
        assert!(!filter.set_tables(&[&good[..], &[0]].concat()));
        assert!(!filter.set_tables(&[0xff; 40]));
        assert_eq!(filter, before);
        // More than are kept.
        filter.promiscuous = false;
        assert!(filter.set_tables(&tables(&[[2, 0, 0, 0, 0, 7]; TABLE + 1], &[])));
        assert_eq!(accepted(&filter), [true, true, false, true]);
    }

    #[test]
    fn vlans() {
        let mut filter = Filter { promiscuous: false, ..Filter::new(OWN, true) };
        let accepts = |filter: &Filter, id| filter.accepts(&frame(OWN, Some(id)));
        assert_eq!((accepts(&filter, 0), accepts(&filter, 5), filter.accepts(&frame(OWN, None))), (true, false, true));
        assert!(filter.set_vlan(5, true) && filter.set_vlan(4095, true) && !filter.set_vlan(4096, true));
        assert_eq!([5, 6, 4095].map(|id| accepts(&filter, id)), [true, false, true]);
        assert!(filter.set_vlan(5, false) && !accepts(&filter, 5));
        assert!(!filter.accepts(&frame(OTHER, Some(4095))));
        let mut blind = Filter { promiscuous: false, ..Filter::new(OWN, false) };
        assert!(accepts(&blind, 5) && !blind.set_vlan(5, true));
    }
}
