use super::*;

#[test]
fn the_tunnel_reads_what_clients_write() {
    let peer = String::from("10.0.0.1");
    let prefixes = vec!["10.1.0.0/16".parse().unwrap()];
    for request in [
        Request::Status {},
        Request::Peers {},
        Request::RouteList {},
        Request::RouteGet {
            address: "fd00::1".parse().unwrap(),
        },
        Request::RouteAdd {
            peer: peer.clone(),
            prefixes: prefixes.clone(),
            replace: true,
        },
        Request::RouteDel {
            prefixes: prefixes.clone(),
        },
        Request::PeerAdd {
            peer: peer.clone(),
            endpoint: None,
            prefixes: prefixes.clone(),
        },
        Request::PeerAdd {
            peer: peer.clone(),
            endpoint: Some("vpn.example".into()),
            prefixes,
        },
        Request::PeerDel { peer },
        Request::Reload { dry_run: false },
        Request::Reload { dry_run: true },
        Request::Capture { snaplen_bytes: 128 },
        Request::Stop {},
        Request::Takeover { protocol: 7 },
    ] {
        let line = serde_json::to_vec(&request).unwrap();
        assert_eq!(Request::read(&line), Ok(request));
    }
}

#[test]
fn keys_may_be_left_out_where_there_is_a_default() {
    let read = |line: &str| Request::read(line.as_bytes());
    let added = read(r#" {"peer":"a","command":"peer-add"}"#).unwrap();
    assert!(matches!(added, Request::PeerAdd { prefixes, .. } if prefixes.is_empty()));
    let added = read(r#"{"prefixes":[],"peer":"a","command":"route-\u0061dd"}"#).unwrap();
    assert!(matches!(added, Request::RouteAdd { replace: false, .. }));
}

#[test]
fn the_error_names_what_is_wrong() {
    for (line, parts) in [
        (r#"["status"]"#, &["object"][..]),
        (r#"{"command":"stop","a\nb":1}"#, &["a b"]),
        (r#"{"command":"sudo"}"#, &["sudo", "route-add"]),
        (r#"{"command":"stop","force":1}"#, &["force"]),
        (r#"{"command":"stop","peer":"a"}"#, &["`peer`"]),
        (r#"{"command":"route-del"}"#, &["`prefixes`"]),
        (r#"{"command":"stop","command":"stop"}"#, &["duplicate"]),
        (r#"{"peer":"a"}"#, &["`command`"]),
        (
            r#"{"command":"route-get","address":7}"#,
            &["7", "IP address"],
        ),
    ] {
        let error = Request::read(line.as_bytes()).unwrap_err();
        assert!(!error.contains('\n'), "{error:?}");
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}
