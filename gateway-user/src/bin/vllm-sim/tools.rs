//! Tool calls: which tool has to be called, and with what.

use serde_json::Value;

/// The tool that `tool_choice` names, or the first one if it merely demands a call.
pub fn tool(body: &Value) -> Option<String> {
    let choice = &body["tool_choice"];
    let named = choice["function"]["name"]
        .as_str()
        .or_else(|| choice["name"].as_str());
    let demanded = *choice == "required" || choice["type"] == "any";
    let first = &body["tools"][0];
    let first = first["function"]["name"]
        .as_str()
        .or_else(|| first["name"].as_str());
    named.or(if demanded { first } else { None }).map(str::to_owned)
}

/// Arguments that fit the tool's schema, as far as its required members go.
pub fn arguments(body: &Value, tool: &str) -> String {
    let tools = body["tools"].as_array().map(Vec::as_slice).unwrap_or_default();
    let schema = tools.iter().find_map(|entry| {
        let function = if entry["function"].is_object() {
            &entry["function"]
        } else {
            entry
        };
        let schema = if function["parameters"].is_null() {
            &function["input_schema"]
        } else {
            &function["parameters"]
        };
        (function["name"] == tool).then_some(schema)
    });
    schema.map_or_else(|| "{}".to_owned(), |schema| example(schema).to_string())
}

fn example(schema: &Value) -> Value {
    if let Some(first) = schema["enum"].get(0) {
        return first.clone();
    }
    match schema["type"].as_str() {
        Some("object") | None => {
            let required = schema["required"]
                .as_array()
                .map(Vec::as_slice)
                .unwrap_or_default();
            let members = required.iter().filter_map(Value::as_str);
            Value::Object(
                members
                    .map(|name| (name.to_owned(), example(&schema["properties"][name])))
                    .collect(),
            )
        }
        Some("integer") => Value::from(8),
        Some("number") => Value::from(0.5),
        Some("boolean") => Value::from(true),
        Some("array") => Value::Array(Vec::new()),
        Some("null") => Value::Null,
        Some(_) => Value::from("shared"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_named_tool_beats_the_first_and_none_is_called_unasked() {
        let tools = json!([{"function": {"name": "a"}}, {"function": {"name": "b"}}]);
        let chosen = |choice: Value| tool(&json!({"tools": tools, "tool_choice": choice}));
        assert_eq!(
            chosen(json!({"type": "function", "function": {"name": "b"}})).as_deref(),
            Some("b")
        );
        assert_eq!(chosen(json!("required")).as_deref(), Some("a"));
        assert_eq!(chosen(json!("auto")), None);
    }

    #[test]
    fn arguments_have_what_the_schema_requires() {
        let schema = json!({"type": "object", "required": ["n", "kind", "inner"], "properties": {
            "n": {"type": "integer"}, "kind": {"enum": ["x", "y"]}, "spare": {"type": "string"},
            "inner": {"type": "object", "required": ["on"], "properties": {"on": {"type": "boolean"}}}}});
        let body = json!({"tools": [{"function": {"name": "a", "parameters": schema}}]});
        let made: Value = serde_json::from_str(&arguments(&body, "a")).unwrap();
        assert_eq!(made, json!({"n": 8, "kind": "x", "inner": {"on": true}}));
    }
}
