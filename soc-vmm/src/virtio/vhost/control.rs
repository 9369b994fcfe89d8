//! The control queue of a network interface of several pairs (virtio 1.2 §5.1.6.5): how many of them the driver uses, and nothing else.

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK};

use crate::virtio::{Chain, Queue, QueueError};

/// Entries of the queue.
pub(super) const CONTROL_SIZE: u16 = 64;
/// Commands before frames have their turn.
const TURN: usize = 16;
/// Bytes of the one command that is known: class, number, pairs.
const COMMAND: usize = 4;

/// Obeys what is in the queue: the pairs of the last command that was obeyed, and whether there is more.
pub(super) fn listen(queue: &mut Queue, chain: &mut Chain, pairs: u16) -> Result<(Option<usize>, bool), QueueError> {
    let mut said = None;
    for _ in 0..TURN {
        if !queue.pop(chain)? {
            queue.publish()?;
            return Ok((said, queue.allow_kicks()?));
        }
        if chain.writable() == 0 {
            return Err(QueueError::Broken("a command without a place for its answer"));
        }
        let mut command = [0; COMMAND];
        let mut obeyed = false;
        if chain.readable() == COMMAND as u64 {
            chain.read(queue.lease(), &mut command)?;
            let [class, number, low, high] = command;
            let wanted = u16::from_le_bytes([low, high]);
            let known = (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) == (class.into(), number.into());
            obeyed = known && (1..=pairs).contains(&wanted);
            said = if obeyed { Some(wanted.into()) } else { said };
        }
        let answer = if obeyed { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        chain.write(queue.lease(), &[answer as u8])?;
        queue.push(chain.head(), 1)?;
    }
    queue.publish()?;
    Ok((said, true))
}
