//! The console's files, which are part of the program: it needs no other to show a page.

use super::answer::{Answer, respond};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderValue, REFERRER_POLICY};

/// Nothing from elsewhere, nothing inline, no frames, and no text that becomes markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

/// Path, type and content of each.
const FILES: [(&str, &str, &str); 4] = [
    (
        "/",
        "text/html; charset=utf-8",
        include_str!("console/index.html"),
    ),
    (
        "/console.css",
        "text/css; charset=utf-8",
        include_str!("console/console.css"),
    ),
    (
        "/console.js",
        "text/javascript; charset=utf-8",
        include_str!("console/console.js"),
    ),
    (
        "/console.svg",
        "image/svg+xml",
        include_str!("console/console.svg"),
    ),
];

/// The file at a path, if there is one.
pub(super) fn file(path: &str) -> Option<Answer> {
    let (_, content_type, text) = FILES.iter().find(|(known, ..)| *known == path)?;
    let mut answer = respond(StatusCode::OK, content_type, Bytes::from_static(text.as_bytes()));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the policy would refuse, and so what would not work.
    #[test]
    fn nothing_is_inline_and_nothing_is_from_elsewhere() {
        for (path, _, text) in FILES {
            for forbidden in [
                " style=",
                " onclick=",
                " onload=",
                "<style",
                "javascript:",
                "innerHTML",
                "eval(",
            ] {
                assert!(!text.contains(forbidden), "{path} has {forbidden}");
            }
            // The one address that is no resource.
            let text = text.replace("http://www.w3.org/2000/svg", "");
            for elsewhere in [
                "src=\"http",
                "href=\"http",
                "url(http",
                "import(",
                "@import",
                "//cdn",
            ] {
                assert!(!text.contains(elsewhere), "{path} has {elsewhere}");
            }
        }
        let page = FILES[0].2;
        assert_eq!(page.matches("<script").count(), 1);
        for (path, ..) in &FILES[1..] {
            assert!(
                page.contains(&format!("\"{path}\"")),
                "the page does not use {path}"
            );
        }
    }
}
