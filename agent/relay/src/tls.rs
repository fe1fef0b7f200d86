//! TLS to a proxy, with the certificates that the system trusts.

use std::io;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

/// What TLS needs to know, read from the system once, when it is first wanted.
#[derive(Debug, Clone)]
pub(crate) struct Tls(Arc<ClientConfig>);

impl Tls {
    /// Reads the system's certificates. SSL_CERT_FILE and SSL_CERT_DIR name others.
    ///
    /// # Errors
    /// If there are none, or nothing secure can be agreed on with anybody.
    pub(crate) fn load() -> io::Result<Self> {
        let loaded = rustls_native_certs::load_native_certs();
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(loaded.certs);
        if added == 0 {
            let why = loaded
                .errors
                .first()
                .map_or_else(|| "there are none".to_owned(), ToString::to_string);
            return Err(io::Error::other(format!(
                "can't read the system's certificates: {why}"
            )));
        }
        Self::trusting(roots)
    }

    fn trusting(roots: RootCertStore) -> io::Result<Self> {
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self(Arc::new(config)))
    }

    /// Begins TLS with a server of this name or address.
    ///
    /// # Errors
    /// If it can't prove that it is the one, or the connection breaks.
    pub(crate) async fn connect(
        &self,
        host: &str,
        stream: TcpStream,
    ) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        TlsConnector::from(self.0.clone())
            .connect(name, stream)
            .await
            .map_err(plain)
    }
}

/// What goes wrong mostly where the scheme is, in plain words.
fn plain(error: io::Error) -> io::Error {
    let reason = error.get_ref().and_then(|reason| reason.downcast_ref());
    match reason {
        Some(rustls::Error::InvalidMessage(_)) => io::Error::new(
            error.kind(),
            "it does not speak TLS; if it is an HTTP proxy, 'upstream' begins with 'http://'",
        ),
        _ => error,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::upstream::Stream;
    use std::process::Command;
    use tokio::io::AsyncWriteExt;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use tokio_rustls::{TlsAcceptor, server};

    /// What both ends of TLS know.
    pub(crate) type Ends = (TlsConnector, TlsAcceptor);

    /// Both ends of TLS for `localhost`.
    pub(crate) fn ends() -> Ends {
        let made = Command::new("openssl")
            .args("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2".split(' '))
            .args("-subj /CN=localhost -addext subjectAltName=DNS:localhost".split(' '))
            .args("-addext basicConstraints=critical,CA:FALSE -keyout - -out -".split(' '))
            .output()
            .unwrap();
        let certificate = CertificateDer::from_pem_slice(&made.stdout).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&made.stdout).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).unwrap();
        let client = Tls::trusting(roots).unwrap().0;
        let server = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        (client.into(), Arc::new(server).into())
    }

    #[tokio::test]
    async fn a_server_without_tls_is_called_that() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await;
        let (mut served, _) = listener.accept().await.unwrap();
        let answer = b"HTTP/1.1 400 Bad Request\r\n\r\n";
        served.write_all(answer).await.unwrap();
        let tls = Tls::trusting(RootCertStore::empty()).unwrap();
        let error = tls.connect("localhost", stream.unwrap()).await.unwrap_err();
        assert!(
            error.to_string().starts_with("it does not speak TLS; "),
            "{error}"
        );
    }

    /// Both ends of TLS over a connection.
    pub(crate) async fn connect_within(
        (connector, acceptor): &Ends,
        ours: TcpStream,
        theirs: TcpStream,
    ) -> (Stream, server::TlsStream<TcpStream>) {
        let name = "localhost".try_into().unwrap();
        let (ours, theirs) = tokio::join!(connector.connect(name, ours), acceptor.accept(theirs));
        (Stream::Tls(Box::new(ours.unwrap())), theirs.unwrap())
    }
}
