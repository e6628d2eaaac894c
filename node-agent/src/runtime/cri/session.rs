//! Commands in containers of a container runtime: it names an address at which it serves their streams (`k8s.io/kubelet`
//! `pkg/cri/streaming`).

use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt as _;
use http::{Request, StatusCode, Uri, header};
use http_body_util::Empty;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};

use super::super::{Failure, Session, Wish};
use super::api::{self, Client};
use super::spdy::{self, Frame};
use crate::channels;

const CHUNK: usize = 32 << 10;
/// The header that says what a stream is for.
const KIND: &str = "streamtype";
/// Numbers of the streams: a client's are odd.
const ERROR: u32 = 1;
const STDIN: u32 = 3;
const STDOUT: u32 = 5;
const STDERR: u32 = 7;
const RESIZE: u32 = 9;

type Socket = TokioIo<Upgraded>;
type Writer = Arc<Mutex<WriteHalf<Socket>>>;

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
    let failed = |error: &dyn std::fmt::Display| {
        Failure::because("ExecError", "the container runtime's streams", error)
    };
    let answer: api::Url = client
        .runtime(method, ask)
        .await
        .map_err(|status| Failure::new("ExecError", status.message()))?;
    let socket = connect(&answer.url).await.map_err(|error| failed(&error))?;
    let (reader, mut writer) = tokio::io::split(socket);
    let streams = [
        (ERROR, "error", true),
        (STDIN, "stdin", wish.stdin),
        (STDOUT, "stdout", wish.stdout),
        (STDERR, "stderr", wish.stderr && !wish.tty),
        (RESIZE, "resize", wish.tty),
    ];
    for (stream, kind, _) in streams.into_iter().filter(|(.., wanted)| *wanted) {
        let opened = spdy::open(stream, KIND, kind, stream == ERROR);
        writer.write_all(&opened).await.map_err(|error| failed(&error))?;
    }
    Ok(session(reader, writer, wish))
}

async fn connect(url: &str) -> anyhow::Result<Socket> {
    let uri: Uri = url.parse()?;
    let (Some(host), Some(port)) = (uri.host(), uri.port_u16()) else {
        anyhow::bail!("{url:?} has no host and port");
    };
    let stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::post(path)
        .header(header::HOST, format!("{host}:{port}"))
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "SPDY/3.1")
        .header("X-Stream-Protocol-Version", "v4.channel.k8s.io")
        .body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    anyhow::ensure!(
        answer.status() == StatusCode::SWITCHING_PROTOCOLS,
        "{url} answers {}",
        answer.status()
    );
    Ok(TokioIo::new(hyper::upgrade::on(answer).await?))
}

fn session(reader: ReadHalf<Socket>, writer: WriteHalf<Socket>, wish: &Wish) -> Session {
    let writer = Arc::new(Mutex::new(writer));
    let (stdin, from) = tokio::io::duplex(CHUNK);
    let (out, stdout) = tokio::io::duplex(CHUNK);
    let (err, stderr) = tokio::io::duplex(CHUNK);
    let (resize, sizes) = mpsc::unbounded_channel();
    if wish.stdin {
        tokio::spawn(forward(from, Arc::clone(&writer)));
    }
    tokio::spawn(resized(sizes, Arc::clone(&writer)));
    let ended = tokio::spawn(receive(reader, writer, out, err));
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

/// What is written, to the command; then the end of it.
async fn forward(mut from: DuplexStream, writer: Writer) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = from.read(&mut buffer).await.unwrap_or_default();
        let frame = spdy::data(STDIN, &buffer[..length], length == 0);
        if writer.lock().await.write_all(&frame).await.is_err() || length == 0 {
            return;
        }
    }
}

async fn resized(mut sizes: mpsc::UnboundedReceiver<(u16, u16)>, writer: Writer) {
    while let Some((width, height)) = sizes.recv().await {
        let size = json!({"Width": width, "Height": height}).to_string();
        let frame = spdy::data(RESIZE, size.as_bytes(), false);
        if writer.lock().await.write_all(&frame).await.is_err() {
            return;
        }
    }
}

/// What the command says, until its end.
async fn receive(
    mut reader: ReadHalf<Socket>,
    writer: Writer,
    mut out: DuplexStream,
    mut err: DuplexStream,
) -> Result<i32, String> {
    loop {
        let frame = spdy::next(&mut reader).await.map_err(|error| error.to_string())?;
        match frame {
            Frame::Data { stream, bytes, last } => {
                // Who does not listen to a stream misses nothing.
                let _written = match stream {
                    STDOUT => out.write_all(&bytes).await,
                    STDERR => err.write_all(&bytes).await,
                    _ => Ok(()),
                };
                match stream {
                    // The end is told at once, and by one that was attached to perhaps not at all.
                    ERROR if !bytes.is_empty() => return channels::code(&bytes),
                    ERROR if last => return Ok(0),
                    _ => {}
                }
            }
            Frame::Ping(ping) => {
                let mut writer = writer.lock().await;
                writer.write_all(&ping).await.map_err(|error| error.to_string())?;
            }
            Frame::Reset(ERROR) | Frame::Goaway => {
                return Err("the container runtime ended the command's streams".to_owned());
            }
            Frame::Reset(_) | Frame::Other => {}
        }
    }
}
