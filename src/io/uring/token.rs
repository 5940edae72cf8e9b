//! What a completion belongs to, packed into its 64 bits of user data.

/// A request of the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Poll of the TUN queue.
    TunPoll,
    /// Multishot receive from the UDP socket.
    Receive,
    /// Send of the batch with this id.
    Send(u16),
    /// Write of the vnet packet with this id.
    Write(u16),
    /// Poll of the control thread's event counter.
    Wake,
    /// Poll for room in the UDP socket's send buffer.
    SendRoom,
}

impl Token {
    /// The user data of a request.
    pub fn to_user_data(self) -> u64 {
        match self {
            Self::TunPoll => 0,
            Self::Receive => 1,
            Self::Send(id) => 2 | u64::from(id) << 16,
            Self::Write(id) => 3 | u64::from(id) << 16,
            Self::Wake => 4,
            Self::SendRoom => 5,
        }
    }

    /// The request behind a completion; `None` for user data never given.
    pub fn from_user_data(data: u64) -> Option<Self> {
        let id = (data >> 16) as u16;
        match data & 0xffff {
            0 => Some(Self::TunPoll),
            1 => Some(Self::Receive),
            2 => Some(Self::Send(id)),
            3 => Some(Self::Write(id)),
            4 => Some(Self::Wake),
            5 => Some(Self::SendRoom),
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
            Token::Receive,
            Token::Send(0),
            Token::Send(65535),
            Token::Write(17),
            Token::Wake,
            Token::SendRoom,
        ] {
            assert_eq!(Token::from_user_data(token.to_user_data()), Some(token));
        }
        assert_eq!(Token::from_user_data(99), None);
    }
}
