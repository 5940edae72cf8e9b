//! Bytes as a datagram of netlink messages: answers and events about links, addresses
//! and routes; and as one message of each kind with the header set right.
#![no_main]

use fastvpn::host::netlink::fuzz::read_datagram;
use libfuzzer_sys::fuzz_target;

/// NLMSG_ERROR, NLMSG_DONE, RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR,
/// RTM_NEWROUTE, RTM_DELROUTE.
const KINDS: [u16; 8] = [2, 3, 16, 17, 20, 21, 24, 25];

fuzz_target!(|data: &[u8]| {
    read_datagram(data);
    let Some((choice, body)) = data.split_first() else {
        return;
    };
    let length = (16 + body.len()) as u32;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(KINDS[usize::from(choice & 7)].to_ne_bytes());
    // NLM_F_ACK_TLVS: an error says why in words.
    message.extend((u16::from(choice >> 7) * 0x200).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    read_datagram(&message);
});
