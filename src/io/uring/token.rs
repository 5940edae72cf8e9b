//! What a completion belongs to, packed into its 64 bits of user data.

use crate::io::udp::Port;

/// A request of the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Poll of the TUN queue.
    TunPoll,
    /// Poll of this receiver's socket.
    UdpPoll(u16),
    /// Send of the batch with this id.
    Send(u16),
    /// Write of the vnet packet with this id.
    Write(u16),
    /// Poll of the control thread's event counter.
    Wake,
    /// Poll for room in the send buffer of the socket of this port.
    SendRoom(Port),
}

impl Token {
    /// The user data of a request.
    pub fn to_user_data(self) -> u64 {
        match self {
            Self::TunPoll => 0,
            Self::UdpPoll(receiver) => 1 | u64::from(receiver) << 16,
            Self::Send(id) => 2 | u64::from(id) << 16,
            Self::Write(id) => 3 | u64::from(id) << 16,
            Self::Wake => 4,
            Self::SendRoom(Port::Listen) => 5,
            Self::SendRoom(Port::Own) => 6,
        }
    }

    /// The request behind a completion; `None` for user data never given.
    pub fn from_user_data(data: u64) -> Option<Self> {
        let id = (data >> 16) as u16;
        match data & 0xffff {
            0 => Some(Self::TunPoll),
            1 => Some(Self::UdpPoll(id)),
            2 => Some(Self::Send(id)),
            3 => Some(Self::Write(id)),
            4 => Some(Self::Wake),
            5 => Some(Self::SendRoom(Port::Listen)),
            6 => Some(Self::SendRoom(Port::Own)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_the_kernel() {
        for token in [
            Token::TunPoll,
            Token::UdpPoll(0),
            Token::UdpPoll(4),
            Token::Send(0),
            Token::Send(65535),
            Token::Write(17),
            Token::Wake,
            Token::SendRoom(Port::Listen),
            Token::SendRoom(Port::Own),
        ] {
            assert_eq!(Token::from_user_data(token.to_user_data()), Some(token));
        }
        assert_eq!(Token::from_user_data(99), None);
    }
}
