//! Fits for people, and for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::fit::{Fit, Part, Quality, TooLittle, Trust};
use super::{Calibration, WINDOWS_TOGETHER};
use crate::command::time;
use crate::ledger::{Millionths, Weights};

/// What is weighed, and how it is called.
const PARTS: [(Part, &str); 4] = [
    (Part::Prompt, "prompt token"),
    (Part::Completion, "completion token"),
    (Part::Kv, "KV token-second"),
    (Part::Step, "step"),
];

/// For people.
pub(super) fn text(calibration: &Calibration) -> String {
    let in_force = &calibration.in_force;
    let mut text = format!(
        "From {} until before {}. In force: theta {}, weights {}, {} and {}\n",
        time::format(calibration.period.from_us()),
        time::format(calibration.period.to_us()),
        in_force.theta,
        in_force.weights.prompt,
        in_force.weights.completion,
        in_force.weights.kv,
    );
    for (upstream, found) in &calibration.by_upstream {
        text += &format!("\n{upstream}\n");
        match found {
            Ok(fit) => describe(&mut text, fit, in_force.theta),
            Err(too_little) => text += &format!("  no fit: {too_little}\n"),
        }
    }
    text
}

// Writing into a String cannot fail.
fn describe(text: &mut String, fit: &Fit, theta_in_force: Millionths) {
    for (part, name) in PARTS
        .into_iter()
        .filter(|(part, _)| *part != Part::Step || fit.theta.is_some())
    {
        let estimate = fit.estimate(part);
        let (us, error_us) = (estimate.seconds * 1e6, estimate.error_s * 1e6);
        let said = match estimate.trust() {
            Trust::Good => "",
            Trust::Entangled => "  not to be trusted by itself: it came and went with the others",
            Trust::Poor => "  not to be trusted: nothing of it could be told from chance",
        };
        let _ = writeln!(text, "  {name:<17}{us:>12.3} µs ± {error_us:.3}{said}");
    }
    let minutes = fit.windows;
    let _ = writeln!(
        text,
        "  {minutes} times {WINDOWS_TOGETHER} windows; error on those that it was not fitted to: {}; with the weights in force: {}",
        quality(&fit.unseen),
        quality(&fit.in_force)
    );
    match fit.theta {
        Some(theta) => {
            let _ = writeln!(
                text,
                "  what steps take whatever is in them is {:.0} % of the time: theta {theta:.2} (in force: {})",
                (1.0 - theta) * 100.0,
                theta_in_force
            );
        }
        None => *text += &format!("  theta: {}\n", fit.why_no_theta()),
    }
    let Weights {
        prompt,
        completion,
        kv,
    } = fit.weights();
    *text += "  ledger:\n";
    if let Some(theta) = fit.theta {
        let _ = writeln!(text, "    theta: {theta:.2}");
    }
    let _ = writeln!(
        text,
        "    weights:\n      prompt: {prompt}\n      completion: {completion}\n      kv: {kv}"
    );
}

fn quality(quality: &Quality) -> String {
    let r_squared = match quality.r_squared {
        Some(r_squared) => format!("R² {r_squared:.3}"),
        None => "no R², since all had the same time".to_owned(),
    };
    format!("{:.1} % ({r_squared})", quality.relative_error * 100.0)
}

/// For programs: one object.
pub(super) fn json(calibration: &Calibration) -> String {
    let in_force = &calibration.in_force;
    let upstreams: serde_json::Map<String, Value> = calibration
        .by_upstream
        .iter()
        .map(|(upstream, found)| (upstream.clone(), one(found)))
        .collect();
    let object = json!({
        "from": time::format(calibration.period.from_us()),
        "to": time::format(calibration.period.to_us()),
        "in_force": {"theta": in_force.theta, "weights": in_force.weights},
        "upstreams": upstreams,
    });
    format!("{object:#}\n")
}

fn one(found: &Result<Fit, TooLittle>) -> Value {
    let fit = match found {
        Ok(fit) => fit,
        Err(too_little) => return json!({"error": too_little.to_string()}),
    };
    let estimates: serde_json::Map<String, Value> = PARTS
        .into_iter()
        .filter(|(part, _)| *part != Part::Step || fit.windows_with_steps > 0)
        .map(|(part, name)| {
            let estimate = fit.estimate(part);
            let is_trusted = estimate.trust() == Trust::Good;
            let value = json!({"seconds": estimate.seconds, "standard_error_s": estimate.error_s, "trusted": is_trusted});
            (name.replace([' ', '-'], "_").to_lowercase(), value)
        })
        .collect();
    let quality =
        |quality: &Quality| json!({"relative_error": quality.relative_error, "r_squared": quality.r_squared});
    json!({
        "theta": fit.theta,
        "weights": fit.weights(),
        "estimates": estimates,
        "minutes": fit.windows,
        "minutes_with_steps": fit.windows_with_steps,
        "unseen": quality(&fit.unseen),
        "in_force": quality(&fit.in_force),
    })
}
