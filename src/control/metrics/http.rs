//! As much of HTTP/1.1 (RFC 9112) as a scrape needs: a request without a body, and one response,
//! after which the connection is closed.

use std::io::IoSlice;
use std::sync::Arc;

use httparse::EMPTY_HEADER;

/// Longest request, its headers included. Prometheus sends some 300 bytes.
pub(super) const REQUEST_BYTES_MAX: usize = 4 << 10;

/// Headers that a request may have. Prometheus sends six.
const HEADERS_MAX: usize = 32;

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// `/metrics`.
    Metrics,
    /// `/healthz`: whether the process answers.
    Health,
    /// `/readyz`: whether packets are carried.
    Readiness,
}

/// What the bytes say that have come so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// It is not all of a request yet.
    Partial,
    /// A request for this page. `is_head`: for the headers alone.
    Request {
        /// What is wanted.
        page: Page,
        /// Whether the response is to have no body.
        is_head: bool,
    },
    /// A request that gets only this status.
    Refused(Status),
}

/// The statuses that responses have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// 200.
    Ok,
    /// 400: the request is not HTTP, or too long.
    BadRequest,
    /// 404: there is no such page.
    NotFound,
    /// 405: neither GET nor HEAD.
    MethodNotAllowed,
    /// 503: it is not ready, or nobody says.
    Unavailable,
}

impl Status {
    /// The number and what is said with it.
    fn text(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::Unavailable => "503 Service Unavailable",
        }
    }
}

/// Reads what has come of a request. What follows it is ignored.
pub fn parse(bytes: &[u8]) -> Parsed {
    let mut headers = [EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) if bytes.len() < REQUEST_BYTES_MAX => Parsed::Partial,
        Ok(httparse::Status::Complete(bytes)) if bytes <= REQUEST_BYTES_MAX => {
            let (method, target) = (request.method, request.path);
            route(method.unwrap_or_default(), target.unwrap_or_default())
        }
        _ => Parsed::Refused(Status::BadRequest),
    }
}

fn route(method: &str, target: &str) -> Parsed {
    let path = target.split('?').next().unwrap_or_default();
    let page = match path {
        "/metrics" => Page::Metrics,
        "/healthz" => Page::Health,
        "/readyz" => Page::Readiness,
        _ => return Parsed::Refused(Status::NotFound),
    };
    match method {
        "GET" | "HEAD" => Parsed::Request {
            page,
            is_head: method == "HEAD",
        },
        _ => Parsed::Refused(Status::MethodNotAllowed),
    }
}

/// A whole response.
#[derive(Debug)]
pub(super) struct Response {
    head: String,
    /// Several responses may share it.
    body: Arc<str>,
}

impl Response {
    /// What is left once so many bytes have been sent.
    pub(super) fn rest(&self, sent_bytes: usize) -> [IoSlice<'_>; 2] {
        let (head, body) = (self.head.as_bytes(), self.body.as_bytes());
        let sent_of_body = sent_bytes.saturating_sub(head.len());
        let rests = [head.get(sent_bytes..), body.get(sent_of_body..)];
        rests.map(|rest| IoSlice::new(rest.unwrap_or_default()))
    }
}

/// A response with a body of this `content_type`. `is_head`: the body is left out, but for its
/// length.
pub(super) fn response(
    status: Status,
    content_type: &str,
    body: Arc<str>,
    is_head: bool,
) -> Response {
    let (text, body_bytes) = (status.text(), body.len());
    let allow = match status {
        Status::MethodNotAllowed => "Allow: GET, HEAD\r\n",
        _ => "",
    };
    let head = format!(
        "HTTP/1.1 {text}\r\nContent-Type: {content_type}\r\nContent-Length: {body_bytes}\r\n\
         {allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    );
    let body = if is_head { Arc::default() } else { body };
    Response { head, body }
}

/// A response of one line of text.
pub(super) fn line(status: Status, text: &str, is_head: bool) -> Response {
    let body = format!("{text}\n").into();
    response(status, "text/plain; charset=utf-8", body, is_head)
}

/// A response that says no more than its status.
pub(super) fn refusal(status: Status) -> Response {
    line(status, status.text(), false)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn get(page: Page) -> Parsed {
        Parsed::Request {
            page,
            is_head: false,
        }
    }

    #[test]
    fn pages_are_found() {
        for (text, parsed) in [
            ("GET /metrics HTTP/1.1\r\n\r\n", get(Page::Metrics)),
            (
                "GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n",
                get(Page::Metrics),
            ),
            (
                "GET /metrics?name[]=up HTTP/1.1\r\n\r\n",
                get(Page::Metrics),
            ),
            ("GET /healthz HTTP/1.1\r\n\r\nGET /", get(Page::Health)),
            (
                "HEAD /readyz HTTP/1.1\nHost: x\n\n",
                Parsed::Request {
                    page: Page::Readiness,
                    is_head: true,
                },
            ),
        ] {
            assert_eq!(parse(text.as_bytes()), parsed, "{text:?}");
        }
    }

    #[test]
    fn all_else_is_refused() {
        use Status::{BadRequest, MethodNotAllowed, NotFound};
        let long = format!(
            "GET /metrics HTTP/1.1\r\nX: {}",
            "x".repeat(REQUEST_BYTES_MAX)
        );
        let many = "X: y\r\n".repeat(HEADERS_MAX + 1);
        let many = format!("GET /metrics HTTP/1.1\r\n{many}\r\n");
        for (text, status) in [
            ("GET / HTTP/1.1\r\n\r\n", NotFound),
            ("POST / HTTP/1.1\r\n\r\n", NotFound),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", NotFound),
            ("GET /../metrics HTTP/1.1\r\n\r\n", NotFound),
            ("GET http://x/metrics HTTP/1.1\r\n\r\n", NotFound),
            ("POST /metrics HTTP/1.1\r\n\r\n", MethodNotAllowed),
            ("get /metrics HTTP/1.1\r\n\r\n", MethodNotAllowed),
            ("GET /metrics HTTP/2.0\r\n\r\n", BadRequest),
            ("GET /metrics\r\n\r\n", BadRequest),
            ("GET /met\0rics HTTP/1.1\r\n\r\n", BadRequest),
            ("GET /metrics HTTP/1.1\r\nHost : x\r\n\r\n", BadRequest),
            ("\x16\x03\x01\x02\0\x01\0\x01\u{fc}\x03\x03", BadRequest),
            ("{\"command\":\"status\"}\n", BadRequest),
            (&long, BadRequest),
            (&many, BadRequest),
        ] {
            assert_eq!(parse(text.as_bytes()), Parsed::Refused(status), "{text:?}");
        }
    }

    /// Byte by byte: each part of a request is one that may still become it.
    #[test]
    fn a_request_may_come_in_pieces() {
        let text = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        for end in 0..text.len() {
            assert_eq!(parse(&text[..end]), Parsed::Partial, "{end}");
        }
        assert_eq!(parse(text), get(Page::Metrics));
    }

    #[test]
    fn responses_are_whole() {
        let rest = |response: &Response, sent: usize| {
            let parts = response.rest(sent);
            let bytes = parts.iter().flat_map(|part| part.to_vec()).collect();
            String::from_utf8(bytes).unwrap()
        };
        let text = |response: Response| rest(&response, 0);
        let parts = response(Status::Ok, "text/x", "all\n".into(), false);
        let full = rest(&parts, 0);
        for sent in 0..=full.len() {
            assert_eq!(rest(&parts, sent), full[sent..]);
        }
        assert!(full.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/x\r\n"));
        assert!(full.contains("\r\nConnection: close\r\n") && full.ends_with("\r\n\r\nall\n"));
        let head = text(response(Status::Ok, "text/x", "all\n".into(), true));
        assert_eq!(format!("{head}all\n"), full);
        assert!(head.contains("\r\nContent-Length: 4\r\n"));
        let refused = text(refusal(Status::MethodNotAllowed));
        assert!(refused.contains("\r\nAllow: GET, HEAD\r\n"), "{refused}");
    }

    proptest! {
        /// Whatever comes: it never waits for more than there may be.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..6000)) {
            let parsed = parse(&bytes);
            prop_assert!(parsed != Parsed::Partial || bytes.len() < REQUEST_BYTES_MAX);
        }

        #[test]
        fn any_target_is_read_or_refused(target in "\\PC{0,40}", end in 0..80usize) {
            let text = format!("GET /{target} HTTP/1.1\r\nHost: x\r\n\r\n");
            parse(&text.as_bytes()[..end.min(text.len())]);
            prop_assert_ne!(parse(text.as_bytes()), Parsed::Partial);
        }
    }
}
