//! What a container runs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::super::{ContainerSpec, Failure};

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    path: PathBuf,
    pub(super) args: Vec<String>,
}

impl Program {
    /// What is executed; without a slash it is looked for in `PATH`.
    pub(super) fn argv0(&self) -> &OsStr {
        self.path.as_os_str()
    }
}

/// The pod's command; without one the executable that stands for the image.
pub(super) fn program(dir: &Path, spec: &ContainerSpec) -> Result<Program, Failure> {
    if let Some((first, rest)) = spec.command.split_first() {
        let args = rest.iter().chain(&spec.args).cloned().collect();
        return Ok(Program {
            path: first.into(),
            args,
        });
    }
    let names = names(&spec.image);
    let found = names
        .iter()
        .map(|name| dir.join(name))
        .find(|path| path.is_file());
    let Some(path) = found else {
        return Err(Failure::new(
            "ErrImagePull",
            format!(
                "image {:?}: this node runs programs of the host: give the container a command, or put an executable at {}",
                spec.image,
                dir.join(names.last().map_or("", String::as_str)).display()
            ),
        ));
    };
    Ok(Program {
        path,
        args: spec.args.clone(),
    })
}

/// Names of the executable that stands for an image: with the tag, then without.
fn names(image: &str) -> Vec<String> {
    let last = image.rsplit('/').next().unwrap_or(image);
    let last = last.split('@').next().unwrap_or(last);
    let untagged = last.split(':').next().unwrap_or(last);
    let mut names = vec![last.to_owned(), untagged.to_owned()];
    names.dedup();
    names.retain(|name| !name.is_empty() && !name.starts_with('.'));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_stands_for_an_executable() {
        assert_eq!(names("kubeguide/tomcat-app:v1"), ["tomcat-app:v1", "tomcat-app"]);
        assert_eq!(names("registry:5000/web"), ["web"]);
        assert_eq!(names("web@sha256:0123"), ["web"]);
        assert!(names("").is_empty() && names("a/..").is_empty());
        let dir = tempfile::tempdir().unwrap();
        let mut spec = ContainerSpec {
            image: "x/web:v2".into(),
            args: vec!["-a".into()],
            ..ContainerSpec::default()
        };
        let failure = program(dir.path(), &spec).unwrap_err();
        assert_eq!(failure.reason, "ErrImagePull");
        assert!(failure.message.contains("x/web:v2"), "{failure}");
        std::fs::write(dir.path().join("web"), "").unwrap();
        assert_eq!(program(dir.path(), &spec).unwrap().path, dir.path().join("web"));
        std::fs::write(dir.path().join("web:v2"), "").unwrap();
        let found = program(dir.path(), &spec).unwrap();
        assert_eq!(
            (found.path, found.args),
            (dir.path().join("web:v2"), vec!["-a".to_owned()])
        );
        spec.command = vec!["sleep".into(), "1".into()];
        let found = program(dir.path(), &spec).unwrap();
        assert_eq!(found.argv0(), "sleep");
        assert_eq!(found.args, ["1", "-a"]);
    }
}
