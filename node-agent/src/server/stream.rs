//! Commands in containers and what they say, over WebSockets (`k8s.io/kubectl/pkg/cmd/exec`, `k8s.io/streaming`).
//!
//! Every message begins with a byte that says which stream it belongs to. Version 5 of the protocol can close one stream.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Mutex, mpsc};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};
use tracing::debug;

use super::{Body, text};
use crate::channels::{self, CLOSE, ERROR, PROTOCOLS, RESIZE, STDERR, STDIN, STDOUT};
use crate::runtime::{Failure, Input, Output, Session, Wish};

/// How long a client has to close the connection in its turn.
const FAREWELL: Duration = Duration::from_secs(2);
const CHUNK: usize = 32 << 10;

type Socket = WebSocketStream<TokioIo<Upgraded>>;
type Sink = Mutex<SplitSink<Socket, Message>>;

/// What a query asks for.
pub(super) fn wish(query: &str) -> Wish {
    let mut wish = Wish::default();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let flag = matches!(value.as_ref(), "true" | "1");
        match name.as_ref() {
            "command" => wish.command.push(value.into_owned()),
            "tty" => wish.tty = flag,
            "stdin" => wish.stdin = flag,
            "stdout" => wish.stdout = flag,
            "stderr" => wish.stderr = flag,
            _ => {}
        }
    }
    wish
}

/// Answers with a WebSocket that the session's streams go through.
pub(super) async fn serve(
    request: &mut Request<Incoming>,
    wish: &Wish,
    begin: impl Future<Output = Result<Session, Failure>>,
) -> Response<Body> {
    let accepted = accept(request.headers());
    let (key, protocol) = match accepted {
        Ok(accepted) => accepted,
        Err(why) => return text(StatusCode::BAD_REQUEST, why),
    };
    if !(wish.stdin || wish.stdout || wish.stderr) {
        return text(
            StatusCode::BAD_REQUEST,
            "you must specify at least 1 of stdin, stdout, stderr",
        );
    }
    // Before the answer, so that what cannot be begun is an answer, too.
    let session = match begin.await {
        Ok(session) => session,
        Err(failure) => return text(StatusCode::INTERNAL_SERVER_ERROR, failure.message),
    };
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        let carried = async {
            let upgraded = upgrade.await.context("change to a WebSocket")?;
            let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
            carry(socket, session).await
        };
        if let Err(error) = carried.await {
            debug!(%error, "a client has gone");
        }
    });
    let mut response = text(StatusCode::SWITCHING_PROTOCOLS, "");
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    match HeaderValue::from_str(&key) {
        Ok(key) => headers.insert(header::SEC_WEBSOCKET_ACCEPT, key),
        Err(_) => return text(StatusCode::BAD_REQUEST, "the WebSocket's key is no text"),
    };
    response
}

/// The answer to the client's key, and the protocol.
fn accept(headers: &HeaderMap) -> Result<(String, &'static str), String> {
    let get = |name: header::HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let is_websocket = get(header::UPGRADE).is_some_and(|to| to.eq_ignore_ascii_case("websocket"));
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| is_websocket);
    let key = key.ok_or("this node speaks WebSocket only: kubectl 1.31 and later do")?;
    let offers = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL);
    let offers: Vec<&str> = offers
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(str::trim))
        .collect();
    let protocol = PROTOCOLS.into_iter().find(|protocol| offers.contains(protocol));
    let protocol = protocol.ok_or_else(|| format!("none of {offers:?} is known here, only {PROTOCOLS:?}"))?;
    Ok((derive_accept_key(key.as_bytes()), protocol))
}

/// Moves bytes until the session has ended and all of its output is with the client, or the client has gone.
async fn carry(socket: Socket, session: Session) -> Result<()> {
    let (sink, stream) = socket.split();
    let sink = Arc::new(Mutex::new(sink));
    let Session {
        stdin,
        stdout,
        stderr,
        resize,
        exit,
    } = session;
    // Clients wait for a first message on what they listen to.
    for (channel, listened) in [(STDOUT, stdout.is_some()), (STDERR, stderr.is_some())] {
        if listened {
            send(&sink, channel, &[]).await?;
        }
    }
    let work = async {
        let output = async { tokio::try_join!(pump(stdout, STDOUT, &sink), pump(stderr, STDERR, &sink)) };
        let (code, output) = tokio::join!(exit, output);
        output?;
        let status = channels::status(code.as_ref().copied().map_err(|failure| failure.message.as_str()));
        send(&sink, ERROR, status.to_string().as_bytes()).await?;
        let close = CloseFrame {
            code: CloseCode::Normal,
            reason: Utf8Bytes::default(),
        };
        sink.lock().await.send(Message::Close(Some(close))).await?;
        Ok::<(), anyhow::Error>(())
    };
    let mut listening = std::pin::pin!(listen(stream, stdin, resize));
    tokio::select! {
        done = work => done?,
        () = listening.as_mut() => anyhow::bail!("the connection was closed"),
    }
    // What the client still sends is read, or it might not see the end of what it was sent.
    let _late = tokio::time::timeout(FAREWELL, listening).await;
    Ok(())
}

async fn send(sink: &Sink, channel: u8, data: &[u8]) -> Result<()> {
    let message = channels::message(channel, data);
    sink.lock().await.send(Message::Binary(message.into())).await?;
    Ok(())
}

/// From the command to the client.
async fn pump(from: Option<Output>, channel: u8, sink: &Sink) -> Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await {
            // A terminal whose last process has ended gives EIO.
            Ok(0) | Err(_) => return Ok(()),
            Ok(length) => send(sink, channel, &buffer[..length]).await?,
        }
    }
}

/// From the client to the command, until the client has gone.
async fn listen(
    mut stream: SplitStream<Socket>,
    mut stdin: Option<Input>,
    resize: Option<mpsc::UnboundedSender<(u16, u16)>>,
) {
    while let Some(Ok(message)) = stream.next().await {
        let data: Bytes = match message {
            Message::Binary(data) => data,
            Message::Text(text) => text.into(),
            Message::Close(_) => return,
            _ => continue,
        };
        match data.split_first() {
            Some((&STDIN, input)) => {
                let written = match &mut stdin {
                    Some(stdin) => stdin.write_all(input).await.and(stdin.flush().await),
                    None => Ok(()),
                };
                // The command does not read any more; what it says and its end are still of interest.
                if written.is_err() {
                    stdin = None;
                }
            }
            Some((&RESIZE, size)) => {
                let size: Value = serde_json::from_slice(size).unwrap_or_default();
                let of = |name: &str| size[name].as_u64().and_then(|value| u16::try_from(value).ok());
                if let (Some(width), Some(height), Some(resize)) = (of("Width"), of("Height"), &resize) {
                    let _ended = resize.send((width, height));
                }
            }
            Some((&CLOSE, [STDIN, ..])) => stdin = None,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        let asked = wish("command=echo&command=a%20b&stdin=true&stdout=1&tty=false&container=c");
        let expected = Wish {
            command: vec!["echo".into(), "a b".into()],
            stdin: true,
            stdout: true,
            ..Wish::default()
        };
        assert_eq!(asked, expected);
    }

    #[test]
    fn handshakes() {
        let mut headers = HeaderMap::new();
        assert!(accept(&headers).unwrap_err().contains("WebSocket"));
        let value = |text: &'static str| HeaderValue::from_static(text);
        headers.insert(header::UPGRADE, value("SPDY/3.1"));
        // the example of RFC 6455, section 1.3
        headers.insert(header::SEC_WEBSOCKET_KEY, value("dGhlIHNhbXBsZSBub25jZQ=="));
        assert!(accept(&headers).is_err());
        headers.insert(header::UPGRADE, value("WebSocket"));
        headers.insert(
            header::SEC_WEBSOCKET_PROTOCOL,
            value("v4.channel.k8s.io, v5.channel.k8s.io"),
        );
        assert_eq!(
            accept(&headers).unwrap(),
            ("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".to_owned(), channels::V5)
        );
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, value("channel.k8s.io"));
        assert!(accept(&headers).unwrap_err().contains("channel.k8s.io"));
    }
}
