//! What a command's streams are called in the messages of a WebSocket (`k8s.io/apimachinery` `remotecommand`): the first byte
//! of each says which stream it belongs to.

use serde_json::{Value, json};

/// The version that can close one stream.
pub(crate) const V5: &str = "v5.channel.k8s.io";
/// The versions that are known here, the best first.
pub(crate) const PROTOCOLS: [&str; 2] = [V5, "v4.channel.k8s.io"];
pub(crate) const STDIN: u8 = 0;
pub(crate) const STDOUT: u8 = 1;
pub(crate) const STDERR: u8 = 2;
/// The end, as the API's Status.
pub(crate) const ERROR: u8 = 3;
/// Sizes of the terminal.
pub(crate) const RESIZE: u8 = 4;
/// Closes the stream that the next byte names.
pub(crate) const CLOSE: u8 = 255;

/// A message of a stream.
pub(crate) fn message(channel: u8, data: &[u8]) -> Vec<u8> {
    [&[channel], data].concat()
}

/// The end of a command: its exit code, or why there is none.
pub(crate) fn status(code: Result<i32, &str>) -> Value {
    match code {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Err(why) => json!({
            "metadata": {}, "status": "Failure", "reason": "InternalError", "message": why, "code": 500,
        }),
    }
}

/// The other way round.
pub(crate) fn code(status: &[u8]) -> Result<i32, String> {
    let status: Value = serde_json::from_slice(status).unwrap_or_default();
    if status["status"] == "Success" {
        return Ok(0);
    }
    let mut causes = status["details"]["causes"].as_array().into_iter().flatten();
    let cause = causes.find(|cause| cause["reason"] == "ExitCode");
    let code = cause.and_then(|cause| cause["message"].as_str()?.parse().ok());
    code.ok_or_else(|| status["message"].as_str().unwrap_or("no reason given").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_and_understood() {
        for end in [Ok(0), Ok(7), Err("gone")] {
            let told = status(end).to_string();
            assert_eq!(code(told.as_bytes()), end.map_err(str::to_owned), "{told}");
        }
        assert!(code(b"{").is_err());
    }
}
