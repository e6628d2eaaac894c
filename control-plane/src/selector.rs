//! Label and field selectors, as `labelSelector` and `fieldSelector` of a list or watch.

use std::fmt;

use serde_json::Value;

use crate::error::ApiError;
use crate::resource::{ResourceInfo, label_key_errors, label_value_errors};

/// A parsed `labelSelector`: all requirements must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
    GreaterThan(i64),
    LessThan(i64),
}

impl LabelSelector {
    /// Reads a selector such as `app in (a,b),!gone,tier=web`; an empty one selects everything.
    ///
    /// # Errors
    /// Bad request with the API's words.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let mut parser = Parser {
            tokens: tokens(text),
            next: 0,
        };
        parser
            .selector()
            .map(|requirements| Self { requirements })
            .map_err(|e| ApiError::bad_request(format!("unable to parse requirement: {e}")))
    }

    /// Whether the object's labels satisfy the selector.
    pub fn matches(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        self.requirements.iter().all(|r| {
            let value = labels.get(&r.key).and_then(Value::as_str);
            match &r.test {
                Test::In(list) => value.is_some_and(|v| list.iter().any(|l| l == v)),
                Test::NotIn(list) => !value.is_some_and(|v| list.iter().any(|l| l == v)),
                Test::Exists => value.is_some(),
                Test::DoesNotExist => value.is_none(),
                Test::GreaterThan(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *n),
                Test::LessThan(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *n),
            }
        })
    }

    /// Whether everything is selected.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    /// One of `= == != , ( ) ! > <`.
    Symbol(&'static str),
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Self::Word(w) => w,
            Self::Symbol(s) => s,
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

fn tokens(text: &str) -> Vec<Token> {
    const SYMBOLS: [&str; 9] = ["==", "!=", "=", "!", ",", "(", ")", ">", "<"];
    let mut rest = text.trim_start();
    let mut found = Vec::new();
    while !rest.is_empty() {
        if let Some(symbol) = SYMBOLS.iter().find(|s| rest.starts_with(**s)) {
            found.push(Token::Symbol(symbol));
            rest = rest.strip_prefix(symbol).unwrap_or_default();
        } else {
            let end = rest
                .find(|c: char| c.is_whitespace() || "=!,()><".contains(c))
                .unwrap_or(rest.len());
            let (word, tail) = rest.split_at(end);
            found.push(Token::Word(word.to_owned()));
            rest = tail;
        }
        rest = rest.trim_start();
    }
    found
}

struct Parser {
    tokens: Vec<Token>,
    next: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.next)
    }

    fn symbol(&self) -> Option<&'static str> {
        match self.peek() {
            Some(Token::Symbol(s)) => Some(s),
            _ => None,
        }
    }

    fn take(&mut self) -> Option<Token> {
        let token = self.peek().cloned();
        self.next += 1;
        token
    }

    /// What was found, as the error texts show it: nothing at the end.
    fn found(&self) -> String {
        self.peek().map(Token::to_string).unwrap_or_default()
    }

    fn selector(&mut self) -> Result<Vec<Requirement>, String> {
        let mut requirements = Vec::new();
        if self.peek().is_none() {
            return Ok(requirements);
        }
        loop {
            match self.peek() {
                Some(Token::Word(_) | Token::Symbol("!")) => requirements.push(self.requirement()?),
                _ => {
                    return Err(format!(
                        "found '{}', expected: !, identifier, or 'end of string'",
                        self.found()
                    ));
                }
            }
            match self.symbol() {
                Some(",") => {
                    self.next += 1;
                    if !matches!(self.peek(), Some(Token::Word(_) | Token::Symbol("!"))) {
                        return Err(format!(
                            "found '{}', expected: identifier after ','",
                            self.found()
                        ));
                    }
                }
                None if self.peek().is_none() => return Ok(requirements),
                _ => {
                    return Err(format!(
                        "found '{}', expected: ',' or 'end of string'",
                        self.found()
                    ));
                }
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let negated = self.symbol() == Some("!");
        if negated {
            self.next += 1;
        }
        let key = match self.take() {
            Some(Token::Word(key)) => key,
            other => {
                let found = other.map(|t| t.to_string()).unwrap_or_default();
                return Err(format!("found '{found}', expected: identifier"));
            }
        };
        if let Some(why) = label_key_errors(&key).into_iter().next() {
            return Err(format!("key: Invalid value: {key:?}: {why}"));
        }
        let test = if negated {
            Test::DoesNotExist
        } else {
            self.operator(&key)?
        };
        Ok(Requirement { key, test })
    }

    fn operator(&mut self, key: &str) -> Result<Test, String> {
        match self.peek().map(Token::text) {
            None | Some(",") => Ok(Test::Exists),
            Some("=" | "==") => {
                self.next += 1;
                Ok(Test::In(vec![self.exact_value(key)?]))
            }
            Some("!=") => {
                self.next += 1;
                Ok(Test::NotIn(vec![self.exact_value(key)?]))
            }
            Some(comparison @ (">" | "<")) => {
                let greater = comparison == ">";
                self.next += 1;
                let value = self.exact_value(key)?;
                let number = value.parse::<i64>().map_err(|_| {
                    format!("values[0][{key}]: Invalid value: {value:?}: for 'Gt', 'Lt' operators, the value must be an integer")
                })?;
                Ok(if greater {
                    Test::GreaterThan(number)
                } else {
                    Test::LessThan(number)
                })
            }
            Some("in") => {
                self.next += 1;
                Ok(Test::In(self.values(key)?))
            }
            Some("notin") => {
                self.next += 1;
                Ok(Test::NotIn(self.values(key)?))
            }
            Some(other) => Err(format!("found '{other}', expected: in, notin, =, ==, !=, gt, lt")),
        }
    }

    /// The word after `=`; nothing means an empty value.
    fn exact_value(&mut self, key: &str) -> Result<String, String> {
        match self.peek() {
            None | Some(Token::Symbol(",")) => Ok(String::new()),
            Some(Token::Word(_)) => {
                let value = self.take().map(|t| t.to_string()).unwrap_or_default();
                check_value(key, 0, &value)?;
                Ok(value)
            }
            Some(other) => Err(format!("found '{other}', expected: identifier")),
        }
    }

    /// `(a,b)`
    fn values(&mut self, key: &str) -> Result<Vec<String>, String> {
        if self.symbol() != Some("(") {
            return Err(format!("found '{}' expected: '('", self.found()));
        }
        self.next += 1;
        let mut values = Vec::new();
        let mut word_before = false;
        loop {
            match self.peek() {
                Some(Token::Word(_)) if !word_before => {
                    let value = self.take().map(|t| t.to_string()).unwrap_or_default();
                    check_value(key, values.len(), &value)?;
                    values.push(value);
                    word_before = true;
                }
                Some(Token::Symbol(",")) => {
                    self.next += 1;
                    if !word_before {
                        values.push(String::new());
                    }
                    word_before = false;
                }
                Some(Token::Symbol(")")) => {
                    self.next += 1;
                    // `()` and `(a,)` hold an empty value.
                    if !word_before {
                        values.push(String::new());
                    }
                    return Ok(values);
                }
                _ => {
                    return Err(format!(
                        "found '{}', expected: ',', ')' or identifier",
                        self.found()
                    ));
                }
            }
        }
    }
}

fn check_value(key: &str, index: usize, value: &str) -> Result<(), String> {
    match label_value_errors(value).into_iter().next() {
        Some(why) => Err(format!("values[{index}][{key}]: Invalid value: {value:?}: {why}")),
        None => Ok(()),
    }
}

/// A parsed `fieldSelector`: all terms must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<Term>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Term {
    field: String,
    value: String,
    equal: bool,
}

/// Fields by which a kind can be selected besides its name and namespace.
fn selectable(kind: &str) -> &'static [&'static str] {
    match kind {
        "Pod" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.podIPs",
            "status.nominatedNodeName",
        ],
        "Node" => &["spec.unschedulable"],
        "Service" => &["spec.clusterIP", "spec.type"],
        "Namespace" => &["status.phase"],
        "Secret" => &["type"],
        "ReplicationController" | "ReplicaSet" => &["status.replicas"],
        "Event" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        _ => &[],
    }
}

impl FieldSelector {
    /// Reads a selector such as `spec.nodeName=n1,status.phase!=Failed`; an empty one selects everything. A backslash
    /// takes the meaning from a comma, an equals sign or a backslash after it.
    ///
    /// # Errors
    /// Bad request if the text is no selector or the kind cannot be selected by a field.
    pub fn parse(r: &ResourceInfo, text: &str) -> Result<Self, ApiError> {
        let mut terms = Vec::new();
        for part in split_unescaped(text) {
            if part.is_empty() {
                continue;
            }
            let bad =
                || ApiError::bad_request(format!("invalid selector: '{text}'; can't understand '{part}'"));
            let (field, value, equal) = split_term(part).ok_or_else(bad)?;
            let known = field == "metadata.name"
                || (field == "metadata.namespace" && r.namespaced)
                || selectable(r.kind).contains(&field);
            if !known {
                return Err(ApiError::bad_request(format!(
                    "field label not supported: {field}"
                )));
            }
            terms.push(Term {
                field: field.to_owned(),
                value: unescape(value).ok_or_else(bad)?,
                equal,
            });
        }
        Ok(Self { terms })
    }

    /// Whether the object's fields satisfy the selector.
    pub fn matches(&self, object: &Value) -> bool {
        self.terms
            .iter()
            .all(|t| (field_text(object, &t.field) == t.value) == t.equal)
    }

    /// The name that `metadata.name=…` asks for, if it does.
    pub fn name(&self) -> Option<&str> {
        self.terms
            .iter()
            .find(|t| t.equal && t.field == "metadata.name")
            .map(|t| t.value.as_str())
    }

    /// Whether everything is selected.
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }
}

/// The field as the text it is compared with.
fn field_text(object: &Value, field: &str) -> String {
    let found = match field {
        // The component that reports an event had two places over time.
        "source" => object["source"]
            .get("component")
            .or_else(|| object.get("reportingComponent")),
        _ => field.split('.').try_fold(object, |value, step| value.get(step)),
    };
    match found {
        None | Some(Value::Null) if field == "spec.unschedulable" || field == "spec.hostNetwork" => {
            "false".to_owned()
        }
        None | Some(Value::Null) => String::new(),
        Some(Value::String(s)) => s.clone(),
        Some(Value::Array(list)) if field == "status.podIPs" => {
            let ips: Vec<&str> = list.iter().filter_map(|e| e["ip"].as_str()).collect();
            ips.join(",")
        }
        Some(other) => other.to_string(),
    }
}

fn split_unescaped(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut start = 0;
    let mut escaped = false;
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                parts.push(text.get(start..i).unwrap_or_default());
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(text.get(start..).unwrap_or_default());
    parts
}

fn split_term(part: &str) -> Option<(&str, &str, bool)> {
    let at = part.find(['=', '!'])?;
    let (field, rest) = part.split_at(at);
    for (operator, equal) in [("!=", false), ("==", true), ("=", true)] {
        if let Some(value) = rest.strip_prefix(operator) {
            return Some((field, value, equal));
        }
    }
    None
}

fn unescape(value: &str) -> Option<String> {
    let mut plain = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next()? {
                next @ ('\\' | ',' | '=') => plain.push(next),
                _ => return None,
            },
            // Unescaped, they would have ended the value.
            ',' | '=' => return None,
            c => plain.push(c),
        }
    }
    Some(plain)
}

/// Whether labels satisfy a `LabelSelector` of an object (`matchLabels`, `matchExpressions`); one that selects nothing in
/// particular selects everything.
pub fn matches_selector(selector: &Value, labels: &Value) -> bool {
    let same = selector["matchLabels"]
        .as_object()
        .into_iter()
        .flatten()
        .all(|(key, value)| labels.get(key) == Some(value));
    let terms = selector["matchExpressions"].as_array();
    same && terms.into_iter().flatten().all(|term| {
        let value = labels.get(term["key"].as_str().unwrap_or_default());
        let listed =
            value.is_some_and(|v| term["values"].as_array().is_some_and(|values| values.contains(v)));
        match term["operator"].as_str().unwrap_or_default() {
            "In" => listed,
            "NotIn" => !listed,
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            _ => false,
        }
    })
}

/// A `LabelSelector` of an object as the text that `labelSelector` takes; empty if it selects everything.
pub fn selector_text(selector: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut terms: Vec<(String, String)> = Vec::new();
    for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
        terms.push((key.clone(), format!("{key}={}", text(value))));
    }
    for term in selector["matchExpressions"].as_array().into_iter().flatten() {
        let key = text(&term["key"]);
        let mut values: Vec<String> = term["values"]
            .as_array()
            .into_iter()
            .flatten()
            .map(text)
            .collect();
        values.sort_unstable();
        let values = values.join(",");
        let written = match term["operator"].as_str().unwrap_or_default() {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "DoesNotExist" => format!("!{key}"),
            _ => key.clone(),
        };
        terms.push((key, written));
    }
    terms.sort();
    let terms: Vec<String> = terms.into_iter().map(|(_, text)| text).collect();
    terms.join(",")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::resource::find;

    fn fixture(name: &str) -> Value {
        let path = format!(
            "{}/tests/fixtures/apiserver-1.36/{name}.json",
            env!("CARGO_MANIFEST_DIR")
        );
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[rstest]
    #[case("", true)]
    #[case("app=web", true)]
    #[case("app==web", true)]
    #[case(" app = web , tier ", true)]
    #[case("app!=web", false)]
    #[case("other!=web", true)]
    #[case("app in (a, web)", true)]
    #[case("app in (a,b)", false)]
    #[case("app notin (a,b)", true)]
    #[case("missing notin (a)", true)]
    #[case("missing in (a)", false)]
    #[case("tier", true)]
    #[case("!tier", false)]
    #[case("!missing,app", true)]
    #[case("empty=", true)]
    #[case("empty in ()", true)]
    #[case("n>4", true)]
    #[case("n<4", false)]
    #[case("app>4", false)]
    #[case("in in (in)", false)]
    fn label_selectors(#[case] text: &str, #[case] expected: bool) {
        let object = json!({"metadata": {"labels": {"app": "web", "tier": "x", "empty": "", "n": "5"}}});
        assert_eq!(LabelSelector::parse(text).unwrap().matches(&object), expected);
        // Without labels only the negative ones hold.
        let bare = LabelSelector::parse(text).unwrap().matches(&json!({}));
        assert_eq!(
            bare,
            [
                "",
                "app!=web",
                "other!=web",
                "app notin (a,b)",
                "missing notin (a)",
                "!tier"
            ]
            .contains(&text)
        );
    }

    #[test]
    fn recorded_errors_and_selectors() {
        let r = find("", "v1", "pods").unwrap();
        let expected = fixture("pod-list-bad-selector");
        let error = LabelSelector::parse("a===b").unwrap_err();
        assert_eq!(error.status(), expected["response"]["body"]);
        let expected = fixture("pod-list-bad-field");
        let error = FieldSelector::parse(r, "foo=bar").unwrap_err();
        assert_eq!(error.status(), expected["response"]["body"]);

        let labels = LabelSelector::parse("app in (myweb,x),!gone").unwrap();
        let fields = FieldSelector::parse(r, "spec.nodeName=rec1,status.phase=Running").unwrap();
        let mut pod = fixture("pod-status-patch")["response"]["body"].clone();
        assert!(labels.matches(&pod));
        assert!(!fields.matches(&pod), "it runs on another node");
        pod["spec"]["nodeName"] = "rec1".into();
        assert!(fields.matches(&pod));
    }

    #[rstest]
    #[case("a b")]
    #[case("a,")]
    #[case(",a")]
    #[case("a in")]
    #[case("a in (")]
    #[case("a in (b")]
    #[case("a in (b c)")]
    #[case("!")]
    #[case("a=b=c")]
    #[case("ä=b")]
    #[case("a=日本")]
    #[case("a>x")]
    #[case("(")]
    fn bad_label_selectors(#[case] text: &str) {
        let error = LabelSelector::parse(text).unwrap_err();
        assert_eq!(error.code, 400);
        assert!(
            error.message.starts_with("unable to parse requirement: "),
            "{}",
            error.message
        );
    }

    #[test]
    fn field_selectors() {
        let pods = find("", "v1", "pods").unwrap();
        let nodes = find("", "v1", "nodes").unwrap();
        let events = find("", "v1", "events").unwrap();
        let pod =
            json!({"metadata": {"name": "p", "namespace": "d"}, "spec": {}, "status": {"phase": "Failed"}});
        for (text, expected) in [
            ("", true),
            ("metadata.name=p", true),
            ("metadata.name!=p", false),
            ("metadata.namespace==d,spec.nodeName=", true),
            ("status.phase!=Failed", false),
            ("spec.nodeName!=", false),
        ] {
            assert_eq!(
                FieldSelector::parse(pods, text).unwrap().matches(&pod),
                expected,
                "{text}"
            );
        }
        assert_eq!(
            FieldSelector::parse(pods, "metadata.name=p").unwrap().name(),
            Some("p")
        );
        assert!(
            FieldSelector::parse(nodes, "spec.unschedulable=false")
                .unwrap()
                .matches(&json!({}))
        );
        assert!(FieldSelector::parse(nodes, "metadata.namespace=d").is_err());
        let event =
            json!({"involvedObject": {"kind": "Pod", "name": "a,b"}, "reason": "R", "type": "Normal"});
        let text = "involvedObject.kind=Pod,involvedObject.name=a\\,b,reason=R,type!=Warning";
        assert!(FieldSelector::parse(events, text).unwrap().matches(&event));
        for bad in ["metadata.name", "metadata.name=a=b", "metadata.name=\\x", "=a"] {
            assert_eq!(FieldSelector::parse(pods, bad).unwrap_err().code, 400, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = LabelSelector::parse(&text);
            let _ = FieldSelector::parse(find("", "v1", "pods").unwrap(), &text);
        }
    }

    #[test]
    fn selectors_of_objects() {
        let selector = serde_json::json!({
            "matchLabels": {"b": "1"},
            "matchExpressions": [
                {"key": "a", "operator": "In", "values": ["y", "x"]},
                {"key": "c", "operator": "DoesNotExist"},
                {"key": "d", "operator": "NotIn", "values": ["z"]},
                {"key": "e", "operator": "Exists"},
            ],
        });
        assert_eq!(selector_text(&selector), "a in (x,y),b=1,!c,d notin (z),e");
        for (labels, expected) in [
            (serde_json::json!({"a": "x", "b": "1", "e": ""}), true),
            (serde_json::json!({"a": "w", "b": "1", "e": ""}), false),
            (serde_json::json!({"a": "x", "b": "1", "c": "", "e": ""}), false),
            (serde_json::json!({"a": "x", "b": "1", "d": "z", "e": ""}), false),
            (serde_json::json!({"a": "x", "b": "1"}), false),
            (serde_json::json!({"a": "x", "e": ""}), false),
        ] {
            assert_eq!(matches_selector(&selector, &labels), expected, "{labels}");
            // The text selects the same.
            let parsed = LabelSelector::parse(&selector_text(&selector)).unwrap();
            assert_eq!(
                parsed.matches(&serde_json::json!({"metadata": {"labels": labels}})),
                expected
            );
        }
        assert!(matches_selector(&serde_json::json!({}), &Value::Null));
    }
}
