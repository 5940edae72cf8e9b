//! Hosts that are not there, for measurements: what they would write to etcd.

use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};

use super::access::Access;
use super::client::{Client, Outcome};
use super::entry::{HostValue, Keys, extra_to_json};
use super::proto::{Operation, PutRequest};
use crate::config::RegistryFiles;
use crate::error::{Error, Result};

/// A host that is not there.
pub struct LoadHost {
    /// Its subnet.
    pub subnet: Ipv4Net,
    /// Where it would be.
    pub public_ip: Ipv4Addr,
    /// What it has besides.
    pub prefixes: Vec<IpNet>,
}

/// Operations in one transaction: etcd takes 128.
const OPERATIONS_MAX: usize = 120;

/// A connection to etcd, and a lease for all these hosts.
pub struct Load {
    runtime: tokio::runtime::Runtime,
    client: Client,
    keys: Keys,
    lease: i64,
}

impl Load {
    /// Connects to the etcd at `url`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn connect(url: &str, prefix: &str) -> Result<Self> {
        let files = RegistryFiles {
            urls: vec![url.to_string()],
            prefix: Some(prefix.to_string()),
            ..RegistryFiles::default()
        };
        let access = Access::read(&files)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|cause| Error::os("cannot start a runtime", cause))?;
        let (client, lease) = runtime.block_on(async {
            let mut client = Client::connect(&access, url).await?;
            let (lease, _) = client.grant(86_400).await?;
            Ok::<_, Error>((client, lease))
        })?;
        Ok(Self {
            runtime,
            client,
            keys: Keys::new(prefix),
            lease,
        })
    }

    /// Writes what these hosts would.
    ///
    /// # Errors
    /// When etcd does not take it.
    pub fn write(&mut self, hosts: &[LoadHost]) -> Result<()> {
        let put = |key: String, value: String| {
            Operation::Put(PutRequest {
                key: key.into(),
                value: value.into(),
                lease: self.lease,
            })
        };
        let mut operations = Vec::new();
        for host in hosts {
            let value = HostValue::new(host.public_ip, None).to_json();
            operations.push(put(self.keys.subnet(host.subnet), value));
            if !host.prefixes.is_empty() {
                let value = extra_to_json(&host.prefixes);
                operations.push(put(self.keys.extra(host.subnet), value));
            }
        }
        let config = self.keys.config();
        for some in operations.chunks(OPERATIONS_MAX) {
            let done = self.client.transact(Vec::new(), some.to_vec(), &config);
            match self.runtime.block_on(done)? {
                Outcome::Done => {}
                Outcome::Refused(_) => return Err(Error::new("etcd has refused")),
                Outcome::Denied(error) => return Err(error),
            }
        }
        Ok(())
    }
}
