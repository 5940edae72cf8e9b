//! What the handshake thread counts: it alone writes, anyone reads.

use crate::counters::Counter;

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident),+ $(,)?) => {
        /// See the module's documentation.
        #[derive(Debug, Default)]
        pub(crate) struct HandshakeCounters {
            $($(#[doc = $doc])+ pub $name: Counter,)+
        }

        impl HandshakeCounters {
            /// Names and values in order of declaration.
            pub(crate) fn values(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$((stringify!($name), self.$name.get()),)+].into_iter()
            }
        }
    };
}

counters! {
    /// Initiations sent.
    initiations_sent,
    /// Responses sent.
    responses_sent,
    /// Cookie replies sent: to initiations without a cookie while under load.
    cookie_replies_sent,
    /// Keepalives sent.
    keepalives_sent,
    /// Initiations received that were answered with a response.
    initiations_received,
    /// Responses received that have completed a handshake.
    responses_received,
    /// Cookie replies received that brought a cookie.
    cookie_replies_received,
    /// Data messages that came to the handshake socket and were passed on.
    data_passed_on,
    /// Datagrams that are none of the four messages.
    drop_malformed,
    /// Handshake messages while this host has no private key.
    drop_no_key,
    /// Initiations and responses whose sender does not know this host's public key.
    drop_mac1,
    /// Under load: initiations of a source that sends too many, and messages that workers pass
    /// on.
    drop_rate_limited,
    /// Handshake messages that are not authentic.
    drop_forged,
    /// Initiations by an authentic stranger.
    drop_unknown_peer,
    /// Initiations that are not newer than the latest of their peer.
    drop_replayed,
    /// Initiations of a peer that sends too many.
    drop_too_soon,
    /// Responses and cookie replies that name no handshake under way.
    drop_unknown_index,
    /// Handshakes that did not begin as there was no index free.
    drop_no_index,
    /// Messages that the kernel refused to send.
    drop_send_error,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_their_names() {
        let counters = HandshakeCounters::default();
        counters.drop_mac1.add(3);
        let set = counters.values().filter(|(_, value)| *value > 0);
        assert_eq!(set.collect::<Vec<_>>(), [("drop_mac1", 3)]);
    }
}
