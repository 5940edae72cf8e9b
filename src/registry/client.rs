//! A client of etcd's API v3, over gRPC: as much of it as a registry takes.

mod leases;

use std::time::Duration;

use tokio::time::timeout;
use tokio_stream::StreamExt;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use zeroize::Zeroizing;

use super::access::Access;
use super::proto::{
    AuthenticateRequest, AuthenticateResponse, Compare, Done, KeyValue, LeaseGrantRequest,
    LeaseGrantResponse, LeaseRequest, LeaseResponse, Operation, RangeRequest, RangeResponse,
    TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest, WatchResponse,
};
use super::view::Pair;
use crate::config::PEERS_MAX;
use crate::error::{Error, Result, shortened};

/// How long a connection, and an answer, may take.
pub(super) const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

/// A connection on which nothing comes is asked this often whether it is alive, and has this
/// long to say so.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIME_MAX: Duration = Duration::from_secs(3);

/// Largest message that is read: a page of keys, or the events of one transaction.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Keys that are asked for at a time.
const PAGE_KEYS: i64 = 5000;

/// Most keys of a network: several times what a tunnel can use.
const KEYS_MAX: usize = 4 * PEERS_MAX;

/// All keys of a range, at one revision.
pub(crate) struct Listed {
    /// The keys.
    pub(crate) pairs: Vec<Pair>,
    /// The cluster's identity.
    pub(crate) cluster: u64,
    /// The revision.
    pub(crate) revision: i64,
}

/// What a transaction came to.
pub(crate) enum Outcome {
    /// Everything was done.
    Done,
    /// Nothing was done; what was asked for in that case.
    Refused(Vec<Pair>),
    /// Nothing was done: this user may not.
    Denied(Error),
}

/// A connection to one of etcd's members. A copy uses the same one.
#[derive(Clone)]
pub(crate) struct Client {
    grpc: Grpc<Channel>,
    /// How it is called in errors.
    url: String,
    user: Option<(String, Zeroizing<String>)>,
    token: Option<AsciiMetadataValue>,
}

impl From<KeyValue> for Pair {
    fn from(kv: KeyValue) -> Self {
        Self {
            key: kv.key,
            value: kv.value,
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            lease: kv.lease,
        }
    }
}

impl Client {
    /// Connects to the member at `url`, and authenticates if there is a user.
    ///
    /// # Errors
    /// Says what failed, on what.
    pub(crate) async fn connect(access: &Access, url: &str) -> Result<Self> {
        let cannot = |error: tonic::transport::Error| {
            Error::new(format!(
                "cannot connect to etcd at {url}: {}",
                chain(&error)
            ))
        };
        let mut endpoint = Endpoint::from_shared(url.to_string())
            .map_err(cannot)?
            .connect_timeout(CONNECT_TIME_MAX)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIME_MAX)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        if url.starts_with("https://") {
            endpoint = endpoint.tls_config(tls(access)).map_err(cannot)?;
        }
        let connected = timeout(CONNECT_TIME_MAX, endpoint.connect()).await;
        let channel = connected
            .map_err(|_| Error::new(format!("cannot connect to etcd at {url}: no answer")))?
            .map_err(cannot)?;
        let mut client = Self {
            grpc: Grpc::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX),
            url: url.to_string(),
            user: access.user.clone(),
            token: None,
        };
        let authenticated = client.authenticate().await;
        authenticated.map_err(|status| client.failed(&status))?;
        Ok(client)
    }

    /// Gets a token, if there is a user.
    async fn authenticate(&mut self) -> std::result::Result<(), Status> {
        let Some((name, password)) = &self.user else {
            return Ok(());
        };
        let request = AuthenticateRequest {
            name: name.clone(),
            password: password.to_string(),
        };
        self.token = None;
        let path = "/etcdserverpb.Auth/Authenticate";
        let answer: AuthenticateResponse = self.unary(path, request).await?;
        let token = answer.token.parse();
        self.token = Some(token.map_err(|_| Status::internal("its token cannot be used"))?);
        Ok(())
    }

    /// Whether something failed because etcd has forgotten the token: it does so when a token
    /// was not used for five minutes, which is less than what lies between two renewals.
    fn is_token_forgotten<T>(&self, answer: &std::result::Result<T, Status>) -> bool {
        let code = answer.as_ref().err().map(Status::code);
        self.token.is_some() && code == Some(Code::Unauthenticated)
    }

    fn fault(&self, what: &str) -> Error {
        Error::new(format!("etcd at {}: {}", self.url, shortened(what)))
    }

    fn failed(&self, status: &Status) -> Error {
        let text = status.message().replace(char::is_control, " ");
        match text.is_empty() {
            true => self.fault(&status.code().to_string()),
            false => self.fault(&text),
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        // A member without a leader says so, rather than answer with what may be old.
        metadata.insert("hasleader", AsciiMetadataValue::from_static("true"));
        if let Some(token) = &self.token {
            metadata.insert("token", token.clone());
        }
        request
    }

    async fn call<Q, A>(&mut self, path: &'static str, message: Q) -> Result<A>
    where
        Q: prost::Message + Clone + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let answer = self.try_call(path, message).await;
        answer.map_err(|status| self.failed(&status))
    }

    /// The same, with etcd's own word for what failed.
    async fn try_call<Q, A>(
        &mut self,
        path: &'static str,
        message: Q,
    ) -> std::result::Result<A, Status>
    where
        Q: prost::Message + Clone + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let answer = self.unary(path, message.clone()).await;
        if !self.is_token_forgotten(&answer) {
            return answer;
        }
        self.authenticate().await?;
        self.unary(path, message).await
    }

    async fn unary<Q, A>(
        &mut self,
        path: &'static str,
        message: Q,
    ) -> std::result::Result<A, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let request = self.request(message);
        let answered = timeout(ANSWER_TIME_MAX, async {
            self.grpc
                .ready()
                .await
                .map_err(|error| Status::unavailable(chain(&error)))?;
            let codec: ProstCodec<Q, A> = ProstCodec::default();
            self.grpc
                .unary(request, PathAndQuery::from_static(path), codec)
                .await
        });
        let answer = answered.await;
        answer.map_err(|_| no_answer())?.map(Response::into_inner)
    }

    /// The key, if there is one; and the cluster's identity and revision.
    ///
    /// # Errors
    /// When etcd does not answer, or refuses.
    pub(crate) async fn get(&mut self, key: &str) -> Result<Listed> {
        self.range(key.into(), Vec::new(), 0, 1)
            .await
            .map(|(listed, _)| listed)
    }

    /// All keys from `first` to the one before `end`, at one revision.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) async fn list(&mut self, first: &str, end: &str) -> Result<Listed> {
        let (mut all, mut is_more) = self.range(first.into(), end.into(), 0, PAGE_KEYS).await?;
        while is_more && let Some(last) = all.pairs.last() {
            let mut next = last.key.clone();
            next.push(0);
            let (page, more) = self
                .range(next, end.into(), all.revision, PAGE_KEYS)
                .await?;
            is_more = more && !page.pairs.is_empty();
            all.pairs.extend(page.pairs);
            if all.pairs.len() > KEYS_MAX {
                return Err(self.fault("there are more keys than a network can have"));
            }
        }
        Ok(all)
    }

    async fn range(
        &mut self,
        key: Vec<u8>,
        range_end: Vec<u8>,
        revision: i64,
        limit: i64,
    ) -> Result<(Listed, bool)> {
        let request = RangeRequest {
            key,
            range_end,
            limit,
            revision,
        };
        let answer: RangeResponse = self.call("/etcdserverpb.KV/Range", request).await?;
        let header = answer.header.unwrap_or_default();
        let listed = Listed {
            pairs: answer.kvs.into_iter().map(Pair::from).collect(),
            cluster: header.cluster_id,
            revision: if revision > 0 {
                revision
            } else {
                header.revision
            },
        };
        Ok((listed, answer.more))
    }

    /// Does all of `operations` if all keys are as `compare` says, else asks for `otherwise`.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) async fn transact(
        &mut self,
        compare: Vec<Compare>,
        operations: Vec<Operation>,
        otherwise: &str,
    ) -> Result<Outcome> {
        let range = RangeRequest {
            key: otherwise.into(),
            ..RangeRequest::default()
        };
        let request = TxnRequest {
            compare,
            success: operations.into_iter().map(Into::into).collect(),
            failure: vec![Operation::Range(range).into()],
        };
        let answer: TxnResponse = match self.try_call("/etcdserverpb.KV/Txn", request).await {
            Ok(answer) => answer,
            Err(status) if status.code() == Code::PermissionDenied => {
                return Ok(Outcome::Denied(self.failed(&status)));
            }
            Err(status) => return Err(self.failed(&status)),
        };
        if answer.succeeded {
            return Ok(Outcome::Done);
        }
        let found = answer
            .responses
            .into_iter()
            .filter_map(|done| match done.response {
                Some(Done::Range(range)) => Some(range.kvs),
                _ => None,
            });
        Ok(Outcome::Refused(found.flatten().map(Pair::from).collect()))
    }

    /// A new lease: its id, and its time to live in seconds.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) async fn grant(&mut self, ttl_s: i64) -> Result<(i64, i64)> {
        let request = LeaseGrantRequest { ttl_s };
        let path = "/etcdserverpb.Lease/LeaseGrant";
        let answer: LeaseGrantResponse = self.call(path, request).await?;
        Ok((answer.id, answer.ttl_s))
    }

    /// How many seconds a lease has left, and how many it was granted; `None` if it has
    /// ended.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) async fn time_left(&mut self, id: i64) -> Result<Option<(i64, i64)>> {
        let path = "/etcdserverpb.Lease/LeaseTimeToLive";
        let answer: LeaseResponse = self.call(path, LeaseRequest { id }).await?;
        Ok((answer.ttl_s > 0).then_some((answer.ttl_s, answer.granted_ttl_s)))
    }

    /// Renews a lease; `None` if it has ended, else its seconds.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) async fn keep_alive(&mut self, id: i64) -> Result<Option<i64>> {
        let mut answer = self.try_keep_alive(id).await;
        if self.is_token_forgotten(&answer) {
            let authenticated = self.authenticate().await;
            authenticated.map_err(|status| self.failed(&status))?;
            answer = self.try_keep_alive(id).await;
        }
        let answer = answer.map_err(|status| self.failed(&status))?;
        let ttl_s = answer.map_or(0, |answer| answer.ttl_s);
        Ok((ttl_s > 0).then_some(ttl_s))
    }

    async fn try_keep_alive(
        &mut self,
        id: i64,
    ) -> std::result::Result<Option<LeaseResponse>, Status> {
        let requests = tokio_stream::once(LeaseRequest { id });
        let answered = timeout(ANSWER_TIME_MAX, async {
            let path = "/etcdserverpb.Lease/LeaseKeepAlive";
            let mut answers: Streaming<LeaseResponse> = self.stream(path, requests).await?;
            answers.message().await
        });
        answered.await.map_err(|_| no_answer())?
    }

    async fn stream<Q, A>(
        &mut self,
        path: &'static str,
        requests: impl tokio_stream::Stream<Item = Q> + Send + 'static,
    ) -> std::result::Result<Streaming<A>, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let request = self.request(requests);
        self.grpc
            .ready()
            .await
            .map_err(|error| Status::unavailable(chain(&error)))?;
        let codec: ProstCodec<Q, A> = ProstCodec::default();
        let path = PathAndQuery::from_static(path);
        let answer = self.grpc.streaming(request, path, codec).await?;
        Ok(answer.into_inner())
    }

    /// Has changes to keys from `first` to the one before `end` reported, from those at
    /// `revision` on.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) async fn watch(&mut self, first: &str, end: &str, revision: i64) -> Result<Watch> {
        let create = WatchCreateRequest {
            key: first.into(),
            range_end: end.into(),
            start_revision: revision,
            progress_notify: true,
        };
        let request = WatchRequest {
            create: Some(create),
        };
        // The stream lasts as long as its requests do.
        let requests = tokio_stream::once(request).chain(tokio_stream::pending());
        let opened = self.stream("/etcdserverpb.Watch/Watch", requests);
        match timeout(ANSWER_TIME_MAX, opened).await {
            Ok(Ok(answers)) => Ok(Watch {
                answers,
                url: self.url.clone(),
            }),
            Ok(Err(status)) => Err(self.failed(&status)),
            Err(_) => Err(self.fault("no answer")),
        }
    }
}

/// What changes.
pub(crate) struct Watch {
    answers: Streaming<WatchResponse>,
    url: String,
}

/// What a watch reports.
pub(crate) enum Watched {
    /// Changes, in order, up to a revision.
    Changes(Vec<(Pair, bool)>, i64),
    /// The changes asked for are not known any more: all is to be listed again.
    Compacted,
}

impl Watch {
    /// Waits for changes. Those are pairs, and whether they were deleted.
    ///
    /// # Errors
    /// When the stream ends, whoever ended it.
    pub(crate) async fn next(&mut self) -> Result<Watched> {
        let url = &self.url;
        let fault = |what: &str| Error::new(format!("etcd at {url}: {}", shortened(what)));
        let answer = match self.answers.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) => return Err(fault("it has closed the connection")),
            Err(status) => {
                let text = status.message().replace(char::is_control, " ");
                return Err(fault(&text));
            }
        };
        if answer.compact_revision > 0 {
            return Ok(Watched::Compacted);
        }
        if answer.canceled {
            let reason = answer.cancel_reason.replace(char::is_control, " ");
            return Err(fault(&format!("the watch was refused: {reason}")));
        }
        // One that reports changes, or that the watch was created, may be ahead of what it has
        // reported by then. An empty one says that there is nothing more up to there.
        let is_notice = !answer.created && answer.events.is_empty();
        let header = answer.header.filter(|_| is_notice);
        let revision = header.map_or(0, |header| header.revision);
        let changes = answer.events.into_iter();
        let changes = changes.filter_map(|event| Some((event.kv?.into(), event.kind == 1)));
        Ok(Watched::Changes(changes.collect(), revision))
    }
}

fn tls(access: &Access) -> ClientTlsConfig {
    let mut tls = ClientTlsConfig::new();
    if let Some(ca) = &access.ca {
        tls = tls.ca_certificate(Certificate::from_pem(ca));
    }
    if let Some((certificate, key)) = &access.identity {
        tls = tls.identity(Identity::from_pem(certificate, &key[..]));
    }
    tls
}

/// As if etcd had said it.
fn no_answer() -> Status {
    Status::deadline_exceeded("no answer")
}

/// An error and what caused it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text += &format!(": {more}");
        }
        cause = error.source();
    }
    shortened(&text.replace(char::is_control, " ")).into_owned()
}
