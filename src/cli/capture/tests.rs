use super::*;

#[test]
fn a_peer_may_be_named_without_its_port() {
    for (peer, wanted, is_it) in [
        ("10.0.0.2:8285", "10.0.0.2:8285", true),
        ("10.0.0.2:8285", "10.0.0.2", true),
        ("10.0.0.2:8285", "10.0.0.2:9", false),
        ("[fd00::2]:8285", "fd00::2", true),
        ("[fd00::2]:8285", "fd00", false),
        ("vpn.example:8285", "vpn", false),
        (
            "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=",
            "10.0.0.2",
            false,
        ),
    ] {
        assert_eq!(is_named(peer, wanted), is_it, "{peer} {wanted}");
    }
}

#[test]
fn a_packet_is_a_line() {
    let mut packet = Vec::new();
    let tcp = etherparse::PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
    let tcp = tcp.tcp(443, 5000, 1, 9).ack(1);
    tcp.write(&mut packet, &[0; 900]).unwrap();
    let header = Header {
        reason: 2,
        gso_bytes: 400,
        timestamp_ns: (86_400 + 3 * 3600 + 25 * 60 + 45) * 1_000_000_000 + 1_999,
        packet_bytes: packet.len() as u32,
        ..Header::default()
    };
    let view = View::of(&packet);
    let mut comment = String::new();
    describe(&header, Some("b:1"), &mut comment);
    let shown = line(&header, Direction::Out, view.as_ref(), &comment);
    let wanted = "03:25:45.000001 out tcp 10.0.0.1:443 -> 10.0.0.2:5000 [.], 940 bytes \
                  (peer b:1, GSO 400, dropped: no_route)\n";
    assert_eq!(shown, wanted);
    describe(&Header::default(), None, &mut comment);
    let shown = line(&Header::default(), Direction::In, None, &comment);
    assert_eq!(shown, "00:00:00.000000 in  not IP, 0 bytes\n");
}

proptest::proptest! {
    /// What a tunnel sends is not trusted to be frames.
    #[test]
    fn any_bytes_end_in_an_error(bytes in proptest::collection::vec(0..3_u8, 0..200)) {
        let (mut reader, mut body) = (&bytes[..], Vec::new());
        while next_frame(&mut reader, &mut body).is_ok() {}
        assert!(body.len() <= BODY_BYTES_MAX);
    }
}
