//! As much of the container runtime interface as the tests need: gRPC with a handful of messages, written by hand.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};

/// A protobuf message under construction.
#[derive(Default, Clone)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
    }

    pub(crate) fn bytes(mut self, field: u64, content: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(content.len() as u64);
        self.0.extend_from_slice(content);
        self
    }

    pub(crate) fn text(self, field: u64, content: &str) -> Self {
        self.bytes(field, content.as_bytes())
    }

    pub(crate) fn message(self, field: u64, content: &Self) -> Self {
        self.bytes(field, &content.0)
    }

    pub(crate) fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }
}

/// All occurrences of a field that has a length.
pub(crate) fn fields(mut message: &[u8], wanted: u64) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    while !message.is_empty() {
        let tag = varint(&mut message);
        match tag & 7 {
            0 => {
                varint(&mut message);
            }
            1 => message = &message[8..],
            2 => {
                let length = usize::try_from(varint(&mut message)).unwrap();
                if tag >> 3 == wanted {
                    found.push(message[..length].to_vec());
                }
                message = &message[length..];
            }
            _ => message = &message[4..],
        }
    }
    found
}

fn varint(message: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = message[0];
        *message = &message[1..];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

pub(crate) fn text(message: &[u8], field: u64) -> String {
    String::from_utf8(fields(message, field).first().cloned().unwrap_or_default()).unwrap()
}

/// One call of the runtime service.
pub(crate) fn call(socket: &Path, method: &str, message: &Message) -> Result<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let work = async {
        let stream = tokio::net::UnixStream::connect(socket).await?;
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let mut body = vec![0];
        body.extend_from_slice(&u32::try_from(message.0.len())?.to_be_bytes());
        body.extend_from_slice(&message.0);
        let request = Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        let headers = response.headers().clone();
        let collected = response.into_body().collect().await?;
        let trailers = collected.trailers().cloned().unwrap_or(headers);
        if trailers.get("grpc-status").is_none_or(|status| status != "0") {
            bail!("{method}: {:?}", trailers.get("grpc-message"));
        }
        Ok(collected.to_bytes().get(5..).unwrap_or_default().to_vec())
    };
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), work)
            .await
            .with_context(|| format!("{method} takes too long"))?
    })
}
