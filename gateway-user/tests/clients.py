"""The official OpenAI and Anthropic clients against a gateway, as a team would use them: base URL, key and headers, nothing else.

Run by `clients.rs`, which starts the servers. Each check runs under its name as `X-Project` and prints one line; what the gateway must
have recorded for it follows as JSON behind `event `. The first check that fails ends the run with a traceback.
"""

import asyncio
import faulthandler
import json
import sys
import uuid

import anthropic
import openai

# A hang fails here, with the stack of the call that hangs.
SECONDS_MAX = 150

GATEWAY, STRICT = sys.argv[1:3]
MODEL, EMBEDDER, TEAM = "tiny", "tiny-embed", "search"
ASK = [{"role": "user", "content": "Write one line about shared GPUs."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "price",
            "parameters": {"type": "object", "properties": {"gpus": {"type": "integer"}}, "required": ["gpus"]},
        },
    }
]
PRICE = {"type": "function", "function": {"name": "price"}}
STREAMS = 20

CHECKS = []


def check(function):
    CHECKS.append((function.__name__, function))
    return function


def headers(project, team=TEAM):
    named = {"X-Project": project}
    return named if team is None else {"X-Team-ID": team, **named}


def openai_client(project, url=GATEWAY, kind=openai.OpenAI, **options):
    return kind(base_url=f"{url}/v1", api_key="any", default_headers=headers(project, **options))


def anthropic_client(project, url=GATEWAY, **options):
    return anthropic.Anthropic(base_url=url, api_key="any", default_headers=headers(project, **options))


def event(project, endpoint, **more):
    """What the gateway must have recorded. A field that is not given is not compared."""
    given = {"team_id": TEAM, "project": project, "endpoint": endpoint, "outcome": "completed", "status_code": 200}
    print("event", json.dumps({**given, **more}), flush=True)


def used(usage):
    """Token counts by the names of the gateway, out of any of the clients' usage objects."""
    first = lambda *names: next(getattr(usage, name) for name in names if getattr(usage, name, None) is not None)
    return {
        "prompt_tokens": first("prompt_tokens", "input_tokens"),
        "completion_tokens": first("completion_tokens", "output_tokens"),
        "usage_source": "reported",
    }


def fails(kind, status, call):
    """Calls what must fail, and gives the error."""
    try:
        call()
    except kind as error:
        assert error.status_code == status, error
        return error
    raise AssertionError(f"expected {kind.__name__}")


def chat_of(client, **more):
    return client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=24, **more)


@check
def chat(project):
    answer = chat_of(openai_client(project))
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id, "the client finds the request id"
    finish = answer.choices[0].finish_reason
    event(project, "/v1/chat/completions", stream=False, finish_reason=finish, request_id=answer._request_id, **used(answer.usage))


def joined(chunks):
    """The text of each choice of a chat stream, and all its chunks."""
    chunks, texts = list(chunks), {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts, chunks


@check
def chat_stream(project):
    whole = chat_of(openai_client("chat_stream_reference"))
    event("chat_stream_reference", "/v1/chat/completions", stream=False, **used(whole.usage))
    texts, chunks = joined(chat_of(openai_client(project), stream=True))
    assert texts == {0: whole.choices[0].message.content}
    # Nothing of what the gateway asks for itself reaches a client that did not ask.
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    # The simulator answers equal prompts alike, so the tokens are known although the client does not see them.
    event(project, "/v1/chat/completions", stream=True, finish_reason=chunks[-1].choices[0].finish_reason, **used(whole.usage))


@check
def chat_stream_usage(project):
    texts, chunks = joined(chat_of(openai_client(project), stream=True, stream_options={"include_usage": True}))
    assert texts[0]
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    event(project, "/v1/chat/completions", stream=True, **used(chunks[-1].usage))


@check
def chat_stream_helper(project):
    # The helper refuses an answer that was cut short, so this one may end by itself.
    with openai_client(project).chat.completions.stream(model=MODEL, messages=ASK, max_tokens=4000) as stream:
        texts = [part.delta for part in stream if part.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(texts) == final.choices[0].message.content
    event(project, "/v1/chat/completions", stream=True, finish_reason="stop", usage_source="reported")


@check
def chat_tool(project):
    for choice, finish in [(PRICE, "stop"), ("required", "tool_calls")]:
        name = f"{project}_{finish}"
        answer = chat_of(openai_client(name), tools=TOOLS, tool_choice=choice)
        call = answer.choices[0].message.tool_calls[0]
        assert call.type == "function" and call.function.name == "price" and call.id
        assert isinstance(json.loads(call.function.arguments), dict)
        assert answer.choices[0].finish_reason == finish
        event(name, "/v1/chat/completions", stream=False, finish_reason=finish, **used(answer.usage))


@check
def chat_tool_stream(project):
    options = {"include_usage": True}
    chunks = list(chat_of(openai_client(project), tools=TOOLS, tool_choice=PRICE, stream=True, stream_options=options))
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert calls[0].function.name == "price" and calls[0].id
    arguments = "".join(call.function.arguments or "" for call in calls)
    assert isinstance(json.loads(arguments), dict), arguments
    event(project, "/v1/chat/completions", stream=True, **used(chunks[-1].usage))


@check
def chat_n2(project):
    answer = chat_of(openai_client(project), n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    whole = {choice.index: choice.message.content for choice in answer.choices}
    event(project, "/v1/chat/completions", stream=False, **used(answer.usage))
    name = f"{project}_stream"
    texts, chunks = joined(chat_of(openai_client(name), n=2, stream=True))
    assert texts == whole and all(chunk.usage is None and chunk.choices for chunk in chunks)
    event(name, "/v1/chat/completions", stream=True, **used(answer.usage))


@check
def completion(project):
    ask = {"model": MODEL, "prompt": "Shared GPUs", "max_tokens": 12}
    answer = openai_client(project).completions.create(**ask)
    assert answer.object == "text_completion" and answer.choices[0].text
    event(project, "/v1/completions", stream=False, **used(answer.usage))
    name = f"{project}_stream"
    chunks = list(openai_client(name).completions.create(stream=True, **ask))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert all(chunk.usage is None for chunk in chunks)
    event(name, "/v1/completions", stream=True, **used(answer.usage))
    name = f"{project}_batch"
    answer = openai_client(name).completions.create(**{**ask, "prompt": ["one", "two prompts"]})
    assert len(answer.choices) == 2
    event(name, "/v1/completions", stream=False, **used(answer.usage))


@check
def embeddings(project):
    vectors = {}
    # The client asks for base64 by itself unless it is told otherwise.
    for name, more in [(project, {}), (f"{project}_float", {"encoding_format": "float"})]:
        answer = openai_client(name).embeddings.create(model=EMBEDDER, input="Shared GPUs", **more)
        vectors[name] = answer.data[0].embedding
        event(name, "/v1/embeddings", stream=False, prompt_tokens=answer.usage.prompt_tokens)
    assert len(vectors[project]) > 16 and all(isinstance(value, float) for value in vectors[project])
    pairs = zip(*vectors.values(), strict=True)
    assert all(abs(encoded - plain) < 1e-6 for encoded, plain in pairs)
    name = f"{project}_batch"
    answer = openai_client(name).embeddings.create(model=EMBEDDER, input=["Shared GPUs", "Billing", "Teams"])
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert all(abs(batch - single) < 1e-6 for batch, single in zip(answer.data[0].embedding, vectors[project], strict=True))
    event(name, "/v1/embeddings", stream=False, prompt_tokens=answer.usage.prompt_tokens)


@check
def models(project):
    listed = [model.id for model in openai_client(project).models.list()]
    assert listed == [MODEL], listed
    event(project, "/v1/models", prompt_tokens=None)


@check
def responses(project):
    ask = {"model": MODEL, "input": "Write one line about shared GPUs.", "max_output_tokens": 4000}
    answer = openai_client(project).responses.create(**ask)
    assert answer.object == "response" and answer.status == "completed" and answer.output_text
    event(project, "/v1/responses", stream=False, **used(answer.usage))
    name = f"{project}_stream"
    parts = list(openai_client(name).responses.create(stream=True, **ask))
    assert parts[0].type == "response.created" and parts[-1].type == "response.completed"
    text = "".join(part.delta for part in parts if part.type == "response.output_text.delta")
    assert text == answer.output_text == parts[-1].response.output_text
    assert used(parts[-1].response.usage) == used(answer.usage)
    event(name, "/v1/responses", stream=True, **used(answer.usage))


def messages_used(usage):
    """Anthropic's input tokens leave the cached ones out; what is billed is all of them."""
    cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    counts = used(usage)
    return {**counts, "prompt_tokens": counts["prompt_tokens"] + cached}


@check
def messages(project):
    ask = {"model": MODEL, "messages": ASK, "max_tokens": 24}
    answer = anthropic_client(project).messages.create(**ask)
    assert answer.type == "message" and answer.role == "assistant" and answer.content[0].text
    assert answer.stop_reason in ("end_turn", "max_tokens"), answer.stop_reason
    event(project, "/v1/messages", stream=False, **messages_used(answer.usage))
    name = f"{project}_stream"
    with anthropic_client(name).messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == answer.content[0].text
    assert final.stop_reason == answer.stop_reason
    event(name, "/v1/messages", stream=True, **messages_used(final.usage))
    name = f"{project}_count"
    count = anthropic_client(name).messages.count_tokens(model=MODEL, messages=ASK)
    assert count.input_tokens > 0
    event(name, "/v1/messages/count_tokens", prompt_tokens=None)


@check
def no_team(project):
    refused = {"outcome": "refused", "status_code": 400, "error_type": "bad_identity", "team_id": ""}
    client = openai_client(project, team=None)
    for stream in (False, True):
        error = fails(openai.BadRequestError, 400, lambda: chat_of(client, stream=stream))
        assert "X-Team-ID" in error.body["message"] and "X-Team-ID" in str(error), error
        assert error.request_id
        # Who does not say the team has no project either.
        event("", "/v1/chat/completions", request_id=error.request_id, **refused)
    client = anthropic_client(project, team=None)
    error = fails(anthropic.BadRequestError, 400, lambda: client.messages.create(model=MODEL, messages=ASK, max_tokens=4))
    assert "X-Team-ID" in error.body["error"]["message"], error.body
    assert error.body["type"] == "error" and error.body["error"]["type"] == "invalid_request_error"
    # Anthropic's own servers name the id in a header that vLLM does not have; it is in the body too.
    event("", "/v1/messages", request_id=error.body["request_id"], **refused)


@check
def unknown_model(project):
    ask = {"model": "nope", "messages": ASK, "max_tokens": 4}
    error = fails(openai.NotFoundError, 404, lambda: openai_client(project).chat.completions.create(**ask))
    assert "nope" in str(error) and error.type == "NotFoundError"
    event(project, "/v1/chat/completions", outcome="client_error", status_code=404, model="nope", prompt_tokens=None)
    name = f"{project}_messages"
    error = fails(anthropic.NotFoundError, 404, lambda: anthropic_client(name).messages.create(**ask))
    assert "nope" in str(error)
    event(name, "/v1/messages", outcome="client_error", status_code=404, model="nope", prompt_tokens=None)


@check
def unknown_model_at_the_gateway(project):
    # This gateway knows which models its upstreams have, and answers for them.
    refused = {"outcome": "refused", "status_code": 404, "error_type": "model_not_found", "model": "nope"}
    ask = {"model": "nope", "messages": ASK, "max_tokens": 4}
    error = fails(openai.NotFoundError, 404, lambda: openai_client(project, STRICT).chat.completions.create(**ask))
    assert "nope" in str(error) and error.code == "model_not_found" and error.type == "not_found_error"
    event(project, "/v1/chat/completions", **refused)
    name = f"{project}_messages"
    error = fails(anthropic.NotFoundError, 404, lambda: anthropic_client(name, STRICT).messages.create(**ask))
    assert "nope" in error.body["error"]["message"] and error.body["error"]["type"] == "not_found_error"
    event(name, "/v1/messages", **refused)


@check
def dead_upstream(project):
    ask = {"model": "dead", "messages": ASK, "max_tokens": 4}
    gone = {"outcome": "unreachable", "status_code": 503, "error_type": "upstream_unreachable"}
    client = openai_client(project, STRICT).with_options(max_retries=1)
    error = fails(openai.InternalServerError, 503, lambda: client.chat.completions.create(**ask))
    assert "upstream" in str(error)
    for _ in range(2):  # The client's own second try is a request like any other.
        event(project, "/v1/chat/completions", **gone)
    name = f"{project}_messages"
    client = anthropic_client(name, STRICT).with_options(max_retries=0)
    error = fails(anthropic.InternalServerError, 503, lambda: client.messages.create(**ask))
    assert error.body["error"]["type"] == "api_error"
    event(name, "/v1/messages", **gone)


@check
def bad_request(project):
    error = fails(openai.BadRequestError, 400, lambda: chat_of(openai_client(project), n="two"))
    assert error.body["message"]
    event(project, "/v1/chat/completions", outcome="client_error", status_code=400, prompt_tokens=None)


@check
def concurrent_streams(project):
    async def one(client, number):
        options = {"include_usage": number % 2 == 0}
        # A prompt of its own, so that a mixed-up stream would show.
        asked = [{"role": "user", "content": f"Line {number}, {uuid.UUID(int=number)}"}]
        create = client.chat.completions.create
        text, usage = "", None
        async for chunk in await create(model=MODEL, messages=asked, max_tokens=60, stream=True, stream_options=options):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        assert (usage is not None) == options["include_usage"]
        whole = await create(model=MODEL, messages=asked, max_tokens=60)
        assert text == whole.choices[0].message.content, number
        assert usage in (None, whole.usage) or used(usage) == used(whole.usage)
        return used(whole.usage)

    async def run():
        async with openai_client(project, kind=openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, number) for number in range(STREAMS)))

    for counts in asyncio.run(run()):
        event(project, "/v1/chat/completions", stream=True, **counts)
        event(project, "/v1/chat/completions", stream=False, **counts)


@check
def broken_off(project):
    body = {"ignore_eos": True}
    stream = openai_client(project).chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=4000, stream=True, extra_body=body
    )
    texts = 0
    for chunk in stream:
        texts += bool(chunk.choices[0].delta.content)
        if texts == 10:
            break
    stream.close()
    aborted = {"outcome": "aborted", "usage_source": "continuous", "finish_reason": ""}
    event(project, "/v1/chat/completions", stream=True, completion_tokens_between=[10, 3999], **aborted)
    name = f"{project}_messages"
    with anthropic_client(name).messages.stream(model=MODEL, messages=ASK, max_tokens=4000, extra_body=body) as stream:
        for number, _ in enumerate(stream.text_stream):
            if number == 5:
                break
    event(name, "/v1/messages", stream=True, outcome="aborted")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS_MAX, exit=True)
    for name, run in CHECKS:
        run(name)
        print("ok", name, flush=True)
    print("done", len(CHECKS), flush=True)
