//! Commands in containers of a container runtime: it names an address at which it serves their streams over a WebSocket.

use std::sync::Arc;

use futures::stream::{SplitSink, SplitStream};
use futures::{FutureExt as _, SinkExt as _, StreamExt as _};
use http::{HeaderValue, Uri, header};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use super::super::{Failure, Session, Wish};
use super::api::{self, Client};
use crate::channels;

const CHUNK: usize = 32 << 10;

type Socket = WebSocketStream<TcpStream>;
type Sink = Arc<Mutex<SplitSink<Socket, Message>>>;

/// Asks for the address, and goes there.
pub(super) async fn open<Q>(
    client: &Client,
    method: &'static str,
    ask: Q,
    wish: &Wish,
) -> Result<Session, Failure>
where
    Q: prost::Message + Send + Sync + 'static,
{
    let failed = |what: &str, error: &dyn std::fmt::Display| Failure::because("ExecError", what, error);
    let answer: api::Url = client
        .runtime(method, ask)
        .await
        .map_err(|status| Failure::new("ExecError", status.message()))?;
    let address = answer.url.replacen("http://", "ws://", 1);
    let uri: Uri = address
        .parse()
        .map_err(|error| failed("the address of streams", &error))?;
    let (Some(host), Some(port)) = (uri.host(), uri.port_u16()) else {
        return Err(failed(
            "the address of streams",
            &format!("{address:?} has no host and port"),
        ));
    };
    let mut request = uri
        .clone()
        .into_client_request()
        .map_err(|error| failed("the address of streams", &error))?;
    let protocols = HeaderValue::from_str(&channels::PROTOCOLS.join(", "));
    let protocols = protocols.map_err(|error| failed("the protocols of streams", &error))?;
    request
        .headers_mut()
        .insert(header::SEC_WEBSOCKET_PROTOCOL, protocols);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|error| failed("connect to the container runtime's streams", &error))?;
    let (socket, answer) = tokio_tungstenite::client_async(request, stream)
        .await
        .map_err(|error| failed("the container runtime's streams", &error))?;
    let protocol = answer.headers().get(header::SEC_WEBSOCKET_PROTOCOL);
    let closes = protocol.is_some_and(|protocol| protocol == channels::V5);
    Ok(session(socket, wish, closes))
}

/// The streams of a WebSocket. `closes`: the other side understands that a stream is closed.
fn session(socket: Socket, wish: &Wish, closes: bool) -> Session {
    let (sink, stream) = socket.split();
    let sink = Arc::new(Mutex::new(sink));
    let (stdin, from) = tokio::io::duplex(CHUNK);
    let (out, stdout) = tokio::io::duplex(CHUNK);
    let (err, stderr) = tokio::io::duplex(CHUNK);
    let (resize, sizes) = mpsc::unbounded_channel();
    if wish.stdin {
        tokio::spawn(forward(from, Arc::clone(&sink), closes));
    }
    tokio::spawn(resized(sizes, sink));
    let ended = tokio::spawn(receive(stream, out, err));
    let exit = async move {
        match ended.await {
            Ok(code) => code.map_err(|why| Failure::new("ExecError", why)),
            Err(error) => Err(Failure::because("ExecError", "the command's streams", error)),
        }
    };
    Session {
        stdin: wish.stdin.then(|| Box::new(stdin) as _),
        stdout: wish.stdout.then(|| Box::new(stdout) as _),
        stderr: (wish.stderr && !wish.tty).then(|| Box::new(stderr) as _),
        resize: wish.tty.then_some(resize),
        exit: exit.boxed(),
    }
}

/// What is written, to the command.
async fn forward(mut from: DuplexStream, sink: Sink, closes: bool) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let message = match from.read(&mut buffer).await {
            Ok(0) | Err(_) if closes => channels::message(channels::CLOSE, &[channels::STDIN]),
            Ok(0) | Err(_) => return,
            Ok(length) => channels::message(channels::STDIN, &buffer[..length]),
        };
        let last = message.first() == Some(&channels::CLOSE);
        if sink
            .lock()
            .await
            .send(Message::Binary(message.into()))
            .await
            .is_err()
            || last
        {
            return;
        }
    }
}

async fn resized(mut sizes: mpsc::UnboundedReceiver<(u16, u16)>, sink: Sink) {
    while let Some((width, height)) = sizes.recv().await {
        let size = json!({"Width": width, "Height": height}).to_string();
        let message = channels::message(channels::RESIZE, size.as_bytes());
        if sink
            .lock()
            .await
            .send(Message::Binary(message.into()))
            .await
            .is_err()
        {
            return;
        }
    }
}

/// What the command says, until its end.
async fn receive(
    mut stream: SplitStream<Socket>,
    mut out: DuplexStream,
    mut err: DuplexStream,
) -> Result<i32, String> {
    while let Some(message) = stream.next().await {
        let data = match message {
            Ok(Message::Binary(data)) => data,
            Ok(Message::Text(text)) => text.into(),
            Ok(Message::Close(_)) => break,
            Ok(_) => continue,
            Err(error) => return Err(error.to_string()),
        };
        // Who does not listen to a stream misses nothing.
        let _written = match data.split_first() {
            Some((&channels::STDOUT, data)) => out.write_all(data).await,
            Some((&channels::STDERR, data)) => err.write_all(data).await,
            Some((&channels::ERROR, status)) if !status.is_empty() => return channels::code(status),
            _ => Ok(()),
        };
    }
    // A stream that is attached to says nothing of the container's end.
    Ok(0)
}
