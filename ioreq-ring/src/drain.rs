//! Serving posted writes in the order in which the guest made them.

use crate::{BusMemory, LaneError, Request, SocLane};

/// A write that nobody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PostedWrite {
    /// The write: [`Request::postable`] holds.
    pub request: Request,
}

/// Serves the posted writes of all lanes, merged by host TSC.
///
/// Two vCPUs with a lock between them must see their order: a write that one posted before it released the lock comes before
/// everything that the other does after taking it. So every tail is looked at, then every tail again. What the first look saw is
/// served. The second look may show writes that were posted *before* some of those, on lanes that the first look passed too early:
/// of the second look's, what is no newer than the first look's newest is served too, in its place; the rest waits for the next
/// drain, whose first look sees them all.
///
/// # Errors
/// The lane whose ring breaks the rules, and how. What was served before stays served.
pub fn drain<C: BusMemory, M: BusMemory, P: BusMemory>(
    lanes: &mut [SocLane<C, M, P>],
    mut serve: impl FnMut(usize, &PostedWrite),
) -> Result<(), (usize, LaneError)> {
    let mut any = false;
    for (i, lane) in lanes.iter_mut().enumerate() {
        lane.tails[0] = lane.tail().map_err(|e| (i, e))?;
        any |= lane.behind(lane.tails[0]) != 0;
    }
    if !any {
        return Ok(());
    }
    for (i, lane) in lanes.iter_mut().enumerate() {
        let (first, second) = (lane.tails[0], lane.tail().map_err(|e| (i, e))?);
        if lane.behind(second) < lane.behind(first) {
            return Err((i, LaneError::Tail { head: first, tail: second }));
        }
        lane.tails[1] = second;
    }
    let mut newest = 0;
    for (i, lane) in lanes.iter().enumerate() {
        // A lane's time stamps ascend (one thread, synchronised TSCs): its last is its newest. A host that lies about it, or
        // changes the slot before it is served, disorders its own guest's writes and nothing else.
        if let Some(last) = lane.behind(lane.tails[0]).checked_sub(1) {
            newest = newest.max(lane.posted(last).map_err(|e| (i, e))?.request.host_tsc);
        }
    }
    while let Some((i, write)) = oldest(lanes, newest)? {
        lanes[i].advance();
        serve(i, &write);
    }
    Ok(())
}

/// The oldest write that this drain still has to serve, and its lane. A lane's own order holds whatever its time stamps say.
fn oldest<C: BusMemory, M: BusMemory, P: BusMemory>(
    lanes: &mut [SocLane<C, M, P>],
    newest: u64,
) -> Result<Option<(usize, PostedWrite)>, (usize, LaneError)> {
    let mut best: Option<(usize, PostedWrite)> = None;
    for (i, lane) in lanes.iter_mut().enumerate() {
        let [first, second] = lane.tails;
        let Some(write) = lane.peek(second).map_err(|e| (i, e))? else { continue };
        let in_first = lane.behind(first).wrapping_sub(1) < lane.behind(second);
        let served = in_first || write.request.host_tsc <= newest;
        if served && best.is_none_or(|(_, b)| write.request.host_tsc < b.request.host_tsc) {
            best = Some((i, write));
        }
    }
    Ok(best)
}
