//! The unix socket that the plugin connects to.

use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use beeline_cni::protocol::{Failure, MAX_MESSAGE, Request, Response, code};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, Shutdown, recvmsg, shutdown};
use tracing::{debug, warn};

use super::service::Service;

/// A plugin that says nothing for so long is gone.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Requests at a time; more wait in the socket's queue.
const PARALLEL: usize = 64;
/// How often DELs that the plugin could not tell are looked for.
const RELEASES: Duration = Duration::from_secs(30);

/// Answers the plugin until it is dropped.
///
/// Threads, not tasks: a request works in several network namespaces and waits for disks.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: UnixListener,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    // its end is what the thread that looks for releases waits for
    ended: Option<mpsc::Sender<()>>,
}

impl Server {
    /// Listens. Threads of the server are in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// When the socket cannot be made.
    pub fn start(path: &Path, service: Arc<Service>) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        // who may connect may make and remove devices
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        let stop = Arc::new(AtomicBool::new(false));
        let waiting = listener.try_clone()?;
        let (ended, end) = mpsc::channel();
        let releases = Arc::clone(&service);
        let threads = vec![
            spawn("cni", {
                let stop = Arc::clone(&stop);
                move || accept(&waiting, &service, &stop)
            })?,
            spawn("cni-releases", move || {
                while end.recv_timeout(RELEASES) == Err(mpsc::RecvTimeoutError::Timeout) {
                    releases.take_releases();
                }
            })?,
        ];
        Ok(Self {
            path: path.to_owned(),
            listener,
            stop,
            threads,
            ended: Some(ended),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.ended = None;
        // wakes the thread that waits for connections, also if the socket has lost its name
        let _woken = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ended = thread.join();
        }
        let _gone = fs::remove_file(&self.path);
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work)
}

fn accept(listener: &UnixListener, service: &Arc<Service>, stop: &AtomicBool) {
    let running = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            break;
        }
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                warn!(%error, "the CNI plugin's connection cannot be accepted");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        while running.load(Ordering::Acquire) >= PARALLEL {
            std::thread::sleep(Duration::from_millis(5));
        }
        running.fetch_add(1, Ordering::AcqRel);
        let (service, counter) = (Arc::clone(service), Arc::clone(&running));
        let started = spawn("cni-request", move || {
            if let Err(error) = serve(&stream, &service) {
                debug!(%error, "the CNI plugin went away");
            }
            counter.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = started {
            running.fetch_sub(1, Ordering::AcqRel);
            warn!(%error, "the CNI plugin's request cannot be served");
        }
    }
    // what is under way is answered
    while running.load(Ordering::Acquire) > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn serve(mut stream: &UnixStream, service: &Service) -> io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let (text, netns) = receive(stream)?;
    let answer = match serde_json::from_slice::<Request>(&text) {
        Ok(request) => service.answer(request, netns.as_ref()),
        Err(error) => Response::Failed(Failure::because(
            code::DECODE,
            "the request cannot be read: plugin of another version?",
            error,
        )),
    };
    stream.write_all(&serde_json::to_vec(&answer)?)
}

/// All that comes before the other side ends, and the file that came with it.
fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<File>)> {
    let mut first = vec![0; 64 << 10];
    let mut control = nix::cmsg_space!([RawFd; 4]);
    let mut netns = None;
    let length = {
        let mut parts = [IoSliceMut::new(&mut first)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = part {
                for fd in fds {
                    // SAFETY: the kernel has just given this process the descriptor, and nobody else knows it.
                    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
                    netns = Some(File::from(owned));
                }
            }
        }
        message.bytes
    };
    first.truncate(length);
    if length > 0 {
        let limit = MAX_MESSAGE.saturating_sub(u64::try_from(length).unwrap_or(MAX_MESSAGE));
        stream.take(limit).read_to_end(&mut first)?;
    }
    Ok((first, netns))
}
