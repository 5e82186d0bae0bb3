//! A headless Chromium, driven by its own protocol over a pair of pipes: it takes nothing but the browser.
//!
//! Every wait has a deadline, and the browser ends with its handle.

use crate::support::DEADLINE;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Its names on Debian and elsewhere.
const NAMES: [&str; 4] = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
];

/// A browser with one page.
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    profile: PathBuf,
    session: Value,
    calls: u64,
    /// What the page said that it should not have: errors on its console, and exceptions.
    pub complaints: Vec<String>,
}

impl Browser {
    /// Starts one.
    pub fn start() -> Browser {
        let name = NAMES
            .into_iter()
            .find(|name| {
                Command::new(name)
                    .arg("--version")
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status()
                    .is_ok_and(|status| status.success())
            })
            .expect("this test needs Chromium (Debian: apt-get install --no-install-recommends chromium)");
        let profile = std::env::temp_dir().join(format!("vllm-gateway-browser-{}", std::process::id()));
        // It speaks on descriptors 3 and 4. As root it runs only without its sandbox, and all that it opens here is our own page.
        let script = "exec \"$0\" --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions \
                      --disable-background-networking --no-proxy-server --user-data-dir=\"$1\" --remote-debugging-pipe about:blank \
                      3<&0 4>&1 0</dev/null 1>/dev/null 2>/dev/null";
        let mut child = Command::new("/bin/sh")
            .args(["-c", script, name])
            .arg(&profile)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the browser starts");
        let (to, out) = (
            child.stdin.take().expect("a pipe"),
            child.stdout.take().expect("a pipe"),
        );
        let (told, from) = channel();
        std::thread::spawn(move || {
            let mut out = BufReader::new(out);
            let mut message = Vec::new();
            while out.read_until(0, &mut message).is_ok_and(|read| read > 0) {
                message.pop();
                let message = std::mem::take(&mut message);
                if told
                    .send(serde_json::from_slice(&message).expect("JSON"))
                    .is_err()
                {
                    return;
                }
            }
        });
        let mut browser = Browser {
            child,
            to,
            from,
            profile,
            session: Value::Null,
            calls: 0,
            complaints: Vec::new(),
        };
        let target = browser.call("Target.createTarget", &json!({"url": "about:blank"}));
        let attached = browser.call(
            "Target.attachToTarget",
            &json!({"targetId": target["targetId"], "flatten": true}),
        );
        browser.session = attached["sessionId"].clone();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        browser
    }

    /// Asks for something and waits for the answer.
    pub fn call(&mut self, method: &str, parameters: &Value) -> Value {
        self.calls += 1;
        let mut message = json!({"id": self.calls, "method": method, "params": parameters});
        if !self.session.is_null() {
            message["sessionId"] = self.session.clone();
        }
        let mut text = message.to_string().into_bytes();
        text.push(0);
        self.to.write_all(&text).expect("the browser listens");
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = self
                .from
                .recv_timeout(left)
                .unwrap_or_else(|_| panic!("no answer to {method} within {DEADLINE:?}"));
            if answer["id"] == self.calls {
                assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                return answer["result"].clone();
            }
            self.heard(&answer);
        }
    }

    fn heard(&mut self, event: &Value) {
        let said = &event["params"];
        let complaint = match event["method"].as_str().unwrap_or_default() {
            "Runtime.exceptionThrown" => said["exceptionDetails"].to_string(),
            "Log.entryAdded" if said["entry"]["level"] == "error" => said["entry"].to_string(),
            "Runtime.consoleAPICalled" if said["type"] == "error" => said["args"].to_string(),
            _ => return,
        };
        self.complaints.push(complaint);
    }

    /// Opens a page.
    pub fn open(&mut self, url: &str) {
        let opened = self.call("Page.navigate", &json!({"url": url}));
        assert!(opened["errorText"].is_null(), "{url}: {}", opened["errorText"]);
        self.until("the page", "document.readyState === 'complete'");
    }

    /// What an expression is, or what its promise comes to.
    pub fn value(&mut self, expression: &str) -> Value {
        let parameters = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let result = self.call("Runtime.evaluate", &parameters);
        assert!(
            result["exceptionDetails"].is_null(),
            "{expression}: {}",
            result["exceptionDetails"]
        );
        result["result"]["value"].clone()
    }

    /// Waits until an expression is true; how long that took.
    pub fn until(&mut self, what: &str, expression: &str) -> Duration {
        let started = Instant::now();
        // The page itself waits, so that the browser is not asked in a loop.
        let wait = format!(
            "new Promise((done) => {{ const look = () => ({expression}) ? done(true) : Date.now() > end ? done(false) : setTimeout(look, 20); \
             const end = Date.now() + 20000; look(); }})"
        );
        assert!(
            self.value(&wait) == true,
            "waited for {what}: {expression}\n{}",
            self.value("document.body.innerText")
        );
        started.elapsed()
    }

    /// Shows pages as in a window of this size, on a screen of this density.
    pub fn resize(&mut self, width: u32, height: u32, density: f64, is_phone: bool) {
        let metrics =
            json!({"width": width, "height": height, "deviceScaleFactor": density, "mobile": is_phone});
        self.call("Emulation.setDeviceMetricsOverride", &metrics);
    }

    /// `light` or `dark`, and no motion, as a user can ask for.
    pub fn prefer(&mut self, scheme: &str) {
        let features = json!({"features": [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"}
        ]});
        self.call("Emulation.setEmulatedMedia", &features);
    }

    /// Writes a picture of the window.
    pub fn picture(&mut self, file: &Path) {
        let picture = self.call("Page.captureScreenshot", &json!({"format": "png"}));
        let bytes = decoded(picture["data"].as_str().expect("a text"));
        std::fs::create_dir_all(file.parent().expect("a directory")).expect("it can be made");
        std::fs::write(file, bytes).expect("it can be written");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Its helpers end by themselves and may still write for a moment.
        let _ = std::fs::remove_dir_all(&self.profile);
    }
}

/// Base64, as the protocol has pictures.
fn decoded(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'=').map(digit).collect();
    let groups = digits.chunks(4);
    groups
        .flat_map(|group| {
            let bits = (0..4).fold(0_u32, |bits, at| {
                bits << 6 | u32::from(group.get(at).copied().unwrap_or(0))
            });
            bits.to_be_bytes()[1..group.len()].to_vec()
        })
        .collect()
}
