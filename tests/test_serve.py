"""The server as a user meets it: a process of its own on loopback, asked by OpenAI's own client."""

import asyncio
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from click.testing import CliRunner

from cnq.chat import prompt_tokens, style_of
from cnq.cli import cli
from cnq.engine.model import Model

openai = pytest.importorskip("openai")

ROOT = Path(__file__).parents[1]
NO_END = {2: -100, 420: -100, 422: -100}  # </s>, [PAD], <|im_end|>: so that an answer goes on until max_tokens
QUESTIONS = ["人工智能是什么？", "The quick brown fox", "写一首诗😀\n\n第二行", "  量化  "]
KEY = "open-sesame"


class Server:
    def __init__(self, gguf: Path, *options: str):
        command = [sys.executable, "-m", "cnq", "serve", str(gguf), "--port", "0", "--threads", "1", "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.told = json.loads(line)
        self.url, self.model = self.told["url"], self.told["model"]

    def client(self, key: str = "any") -> "openai.OpenAI":
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)

    def request(self, method, path, body=None, headers=None):
        """(status, JSON, headers) of a request as it is."""
        connection = self.connection()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        raw = response.read()
        connection.close()
        return response.status, json.loads(raw) if raw.startswith(b"{") else raw, response.headers

    def chat(self, text="你好", **options):
        options = {"model": self.model, "temperature": 0, "max_tokens": 20} | options
        return self.client().chat.completions.create(messages=[{"role": "user", "content": text}], **options)

    def health(self):
        return self.request("GET", "/health")[1]

    def wait_for(self, seconds=5, **state):
        """Wait until /health says so."""
        until = time.monotonic() + seconds
        while any(self.health()[name] != value for name, value in state.items()):
            assert time.monotonic() < until, (state, self.health())
            time.sleep(0.01)

    def long_stream(self, n=3500):
        """A streamed answer of many tokens: (connection, response)."""
        connection = self.connection()
        body = {"messages": [{"role": "user", "content": "长"}], "max_tokens": n, "logit_bias": NO_END, "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection, connection.getresponse()


@contextmanager
def running(gguf, *options):
    server = Server(gguf, *options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def model_path(gguf):
    return gguf(vocab="spm-added", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def server(model_path):
    """One slot, two may wait, nobody needs a key."""
    with running(model_path, "--queue", "2") as server:
        yield server


@pytest.fixture(scope="module")
def guarded(model_path):
    """Two slots behind a key, for the pages of one origin."""
    options = ("--parallel", "2", "--api-key", KEY, "--cors", "http://localhost:3000", "--ctx", "512")
    with running(model_path, *options) as server:
        yield server


@pytest.fixture(scope="module")
def model(model_path):
    with Model(model_path, n_ctx=512, n_threads=1) as model:
        yield model


def streamed(chunks):
    """(text, finish reason, pieces) of a stream."""
    pieces, reason = [], None
    for chunk in chunks:
        for choice in chunk.choices:
            content = choice.delta.content if hasattr(choice, "delta") else choice.text
            pieces += [content] if content else []
            reason = choice.finish_reason or reason
    return "".join(pieces), reason, pieces


# Answers


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_the_terminal_chats_streamed_or_not(server, model_path, question):
    whole = server.chat(question, max_tokens=60)
    text, reason, _ = streamed(server.chat(question, max_tokens=60, stream=True))
    options = ["--prompt", question, "--temperature", "0", "--max-tokens", "60", "--threads", "1", "--json"]
    told = json.loads(CliRunner().invoke(cli, ["chat", str(model_path), *options]).output)["answer"]
    assert whole.choices[0].message.content == text == told
    assert whole.choices[0].finish_reason == reason
    assert whole.choices[0].message.role == "assistant"


def test_the_prompt_is_the_chats_and_what_was_read_is_not_read_again(server, model, model_path):
    messages = [{"role": "system", "content": "简短。"}, {"role": "user", "content": "你好"}]
    client = server.client()
    first = client.chat.completions.create(model=server.model, messages=messages, max_tokens=10, temperature=0)
    prompt = prompt_tokens(model, style_of(model.fields, model_path, None), messages)
    assert prompt.count(model.bos) == 1
    assert first.usage.prompt_tokens == len(prompt)
    assert first.usage.total_tokens == len(prompt) + first.usage.completion_tokens
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "再来"}]
    second = client.chat.completions.create(model=server.model, messages=messages, max_tokens=5)
    assert second.usage.prompt_tokens_details.cached_tokens >= len(prompt) - 1
    parts = [{"role": "developer", "content": "简短。"},
             {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]}]  # fmt: skip
    same = client.chat.completions.create(model=server.model, messages=parts, max_tokens=10, temperature=0)
    assert same.choices[0].message.content == first.choices[0].message.content


def test_an_answer_as_the_client_has_it_may_be_sent_back(server):
    said = server.chat().choices[0].message.model_dump()
    assert None in said.values()
    messages = [{"role": "user", "content": "你好"}, said, {"role": "user", "content": "再来"}]
    assert server.client().chat.completions.create(model=server.model, messages=messages, max_tokens=3)


def test_characters_cut_into_tokens_are_streamed_whole(server, model):
    """Only bytes of 量, and a grammar that wants sound UTF-8 of them."""
    bytes_of = {model.fields["tokenizer.ggml.tokens"].index(f"<0x{b:02X}>"): 60 for b in "量".encode()}
    options = {"logit_bias": bytes_of | NO_END, "response_format": {"type": "json_object"}, "max_tokens": 100}
    text, _, pieces = streamed(server.chat(stream=True, **options))
    assert server.chat(**options).choices[0].message.content == text
    wide = [c for c in text if ord(c) > 0x7F]
    assert len(wide) > 10
    assert "�" not in text
    assert len(pieces) < 80  # of 100 tokens


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_the_answer_and_are_not_shown(server, stream):
    text = server.chat(max_tokens=60, logit_bias=NO_END).choices[0].message.content
    for stop in (text[20:24], [text[30:33], "不会出现的", text[20:24]]):
        answer = server.chat(max_tokens=60, logit_bias=NO_END, stop=stop, stream=stream)
        found = streamed(answer)[:2] if stream else (answer.choices[0].message.content, answer.choices[0].finish_reason)
        first = min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)
        assert found == (text[:first], "stop")


def test_an_answer_is_cut_at_max_tokens_by_either_name_and_at_the_end_of_the_context(server):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = server.chat(**{"max_tokens": None, name: 7}, logit_bias=NO_END)
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 7)
    answer = server.client().completions.create(model=server.model, prompt=[5] * 4090, max_tokens=50, logit_bias=NO_END)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 6)


def test_usage_comes_last_in_a_stream_when_asked_for(server):
    chunks = list(server.chat(stream=True, stream_options={"include_usage": True}))
    assert [bool(c.choices) for c in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage == server.chat().usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert all(c.usage is None for c in chunks[:-1])
    assert not any(c.usage for c in server.chat(stream=True))


def test_completions_go_on_from_a_text_with_one_bos(server, model):
    client = server.client()
    texts = set()
    for prompt in (
        "北京的秋天",
        ["北京的秋天"],
        "<s>北京的秋天",
        model.tokenize("北京的秋天", add_special=True, parse_special=True),
    ):
        answer = client.completions.create(model=server.model, prompt=prompt, temperature=0, max_tokens=12)
        texts.add(answer.choices[0].text)
        assert answer.usage.prompt_tokens == len(model.tokenize("北京的秋天", add_special=True, parse_special=True))
    assert len(texts) == 1
    stream = client.completions.create(model=server.model, prompt="北京的秋天", temperature=0, max_tokens=12, stream=True)
    assert {streamed(stream)[0]} == texts
    assert client.completions.create(model=server.model, prompt="a", logit_bias=NO_END).usage.completion_tokens == 16


def test_log_probabilities_are_the_models(server, model):
    answer = server.client().completions.create(
        model=server.model, prompt="人工智能", max_tokens=6, temperature=0, logprobs=3, logit_bias=NO_END,
        extra_body={"repeat_penalty": 1},
    ).choices[0]  # fmt: skip
    prompt = model.tokenize("人工智能", add_special=True, parse_special=True)
    logits = model.logits(prompt)[-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert answer.logprobs.token_logprobs[0] == pytest.approx(logprobs[np.argsort(-logits)][0], abs=0.01)
    assert sorted(answer.logprobs.top_logprobs[0].values(), reverse=True) == pytest.approx(
        np.sort(logprobs)[::-1][:3], abs=0.01
    )
    assert answer.logprobs.text_offset[0] == 0
    assert len(answer.logprobs.tokens) == len(answer.logprobs.text_offset) == 6
    chat = server.chat(logprobs=True, top_logprobs=2, logit_bias=NO_END).choices[0].logprobs.content
    parts = [s for c in server.chat(logprobs=True, top_logprobs=2, logit_bias=NO_END, stream=True) for o in c.choices
             if o.logprobs for s in o.logprobs.content]  # fmt: skip
    assert parts == chat[: len(parts)]
    assert len(chat) == 20
    assert all(len(s.top_logprobs) == 2 and s.logprob <= 0 for s in chat)


def test_sampling_options_reach_the_sampler(server, model):
    hot = {"temperature": 2, "logit_bias": NO_END, "extra_body": {"top_k": 0, "repeat_penalty": 1}, "top_p": 1}
    text = lambda **options: server.chat(**hot | options).choices[0].message.content  # noqa: E731
    assert text(seed=1) == text(seed=1)
    assert len({text(seed=n) for n in range(4)}) > 1
    assert len({text() for _ in range(4)}) > 1
    greedy = server.chat(logit_bias=NO_END, extra_body={"repeat_penalty": 1}).choices[0].message.content
    assert text(extra_body={"top_k": 1, "repeat_penalty": 1}) == greedy
    assert text(top_p=0) == greedy
    assert text(extra_body={"top_k": 0, "min_p": 1, "repeat_penalty": 1}) == greedy
    token = model.tokenize("量化", add_special=False, parse_special=False)[-1]
    assert server.chat(logit_bias={token: 100}, max_tokens=3).choices[0].message.content.count("量化") == 3
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert server.chat(logit_bias={token: 50}, max_tokens=3, **{penalty: 2}).choices[0].message.content.count("量化") == 3
        assert server.chat(logit_bias=NO_END, **{penalty: 2}).choices[0].message.content != greedy


def test_json_is_json(server):
    schema = {"type": "object", "required": ["名", "n"], "additionalProperties": False,
              "properties": {"名": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}}}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = server.chat(response_format=wanted, temperature=1, seed=seed, max_tokens=200).choices[0]
        if answer.finish_reason == "stop":
            found = json.loads(answer.message.content)
            assert found.keys() == {"名", "n"} and len(found["名"]) <= 5 and isinstance(found["n"], int)
    answer = server.chat(response_format={"type": "json_object"}, max_tokens=200, temperature=1.5, seed=3)
    assert answer.choices[0].message.content.startswith("{")


def test_two_at_a_time_say_what_one_says(guarded):
    client = guarded.client(KEY)

    def ask(question):
        messages = [{"role": "user", "content": question}]
        return client.chat.completions.create(model=guarded.model, messages=messages, temperature=0, max_tokens=80)

    alone = [ask(q).choices[0].message.content for q in QUESTIONS]
    together = {}
    threads = [threading.Thread(target=lambda q=q: together.setdefault(q, ask(q))) for q in QUESTIONS]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [together[q].choices[0].message.content for q in QUESTIONS] == alone


# Vectors and models


def test_embeddings_are_the_mean_of_the_hidden_states(server, model, model_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    client = server.client()
    texts = ["人工智能正在改变我们的生活方式。" * 12, "fox"]
    answer = client.embeddings.create(model=server.model, input=texts)
    reference = transformers.AutoModel.from_pretrained(model_path.parent / "hf", dtype=torch.float32)
    for text, found in zip(texts, answer.data, strict=True):
        ids = model.tokenize(text, add_special=True, parse_special=True)
        hidden = reference(torch.tensor([ids])).last_hidden_state[0].detach().numpy().mean(0)
        assert np.linalg.norm(found.embedding) == pytest.approx(1, abs=1e-5)
        assert np.array(found.embedding) == pytest.approx(hidden / np.linalg.norm(hidden), abs=2e-3)  # attention in float16
    plain = client.embeddings.create(model=server.model, input=texts, encoding_format="float")
    assert [d.embedding for d in plain.data] == [d.embedding for d in answer.data]
    assert answer.usage.prompt_tokens == sum(len(model.tokenize(t, add_special=True, parse_special=True)) for t in texts)
    ids = model.tokenize("fox", add_special=True, parse_special=True)
    assert client.embeddings.create(model=server.model, input=[ids]).data[0].embedding == answer.data[1].embedding


def test_models(server):
    assert [m.id for m in server.client().models.list()] == [server.model]
    assert server.client().models.retrieve(server.model).owned_by == "cnq"
    with pytest.raises(openai.NotFoundError, match=server.model):
        server.client().models.retrieve("gpt-4")


# Refusals

LONG = "长" * 333_334  # 1 MB


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found"),
        ({"n": 2}, 400, "n", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        ({"functions": []}, 400, "functions", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, 400, "reasoning_effort", "unsupported_parameter"),
        ({"tempreature": 1}, 400, "tempreature", "unsupported_parameter"),
        ({"temperature": 3}, 400, "temperature", "invalid_value"),
        ({"temperature": "hot"}, 400, "temperature", "invalid_value"),
        ({"top_p": float("nan")}, 400, "top_p", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"stop": ""}, 400, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, 400, "stop", "invalid_value"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias", "invalid_value"),
        ({"top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, None, None),
        ({"messages": [{"role": "user", "content": LONG}]}, 400, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "长 " * 3000}]}, 400, "messages", "context_length_exceeded"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a*)*"}}}}, 400,
         "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "maxLength": 10**6}}}}, 400,
         "response_format", "invalid_value"),
    ],
)  # fmt: skip
def test_a_bad_parameter_is_named(server, body, status, param, code):
    found, told, _ = server.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | body)
    assert found == status, told
    assert told["error"]["type"] == "invalid_request_error"
    assert told["error"]["message"]
    if code:
        assert (told["error"]["param"], told["error"]["code"]) == (param, code)


def test_what_only_concerns_openais_house_is_ignored_and_null_is_nothing(server):
    options = {"user": "u", "store": False, "metadata": {"a": "b"}, "n": 1, "tools": [], "stop": None, "seed": None,
               "temperature": None, "function_call": None}  # fmt: skip
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2} | options
    assert server.request("POST", "/v1/chat/completions", body)[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}, 400),
        ("/v1/completions", {"prompt": ""}, 200),  # bos alone
        ("/v1/completions", {"prompt": []}, 400),
        ("/v1/completions", {"prompt": [-1]}, 400),
        ("/v1/completions", {"prompt": "a", "echo": True}, 400),
        ("/v1/completions", {"prompt": LONG}, 400),
        ("/v1/completions", {"prompt": [5] * 4096}, 400),
        ("/v1/embeddings", {"input": LONG}, 400),
        ("/v1/embeddings", {"input": [[10**9]]}, 400),
        ("/v1/embeddings", {"input": "a", "dimensions": 5}, 400),
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b"\xff", 400),
        ("/v1/chat/completions", b"", 400),
        ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"\\ud83d"}]}', 400),
        ("/v1/chat/completions", b'{"prompt":"' + b"a" * (5 << 20) + b'"}', 413),
        ("/v1/nothing", {}, 404),
    ],
)
def test_bad_requests_are_answered_in_openais_form(server, path, body, status):
    found, told, _ = server.request("POST", path, body)
    assert found == status, told
    assert status == 200 or set(told["error"]) == {"message", "type", "param", "code"}


def test_no_key_no_answer(guarded):
    for key in ("wrong", "钥匙", KEY[:-1], KEY + "x", ""):
        status, told, headers = guarded.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert (status, told["error"]["code"], headers["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert guarded.request("GET", "/v1/models")[0] == 401
    assert guarded.request("POST", "/v1/chat/completions", {"messages": []})[0] == 401
    with pytest.raises(openai.AuthenticationError):
        guarded.client("wrong").models.list()
    assert guarded.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})[0] == 200
    assert guarded.health()["status"] == "ok"  # for a watchdog


def test_pages_in_a_browser_may_ask_only_when_they_were_named(server, guarded):
    page = {"Origin": "http://localhost:3000"}
    asking = page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    assert "Access-Control-Allow-Origin" not in server.request("GET", "/v1/models", headers=page)[2]
    assert server.request("OPTIONS", "/v1/chat/completions", headers=asking)[0] == 405
    status, _, headers = guarded.request("OPTIONS", "/v1/chat/completions", headers=asking)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, "http://localhost:3000")
    assert guarded.request("GET", "/v1/models", headers=page)[2]["Access-Control-Allow-Origin"] == "http://localhost:3000"
    other = {"Origin": "http://evil.example"}
    assert "Access-Control-Allow-Origin" not in guarded.request("GET", "/v1/models", headers=other)[2]
    # What a page can send without asking first, and a name of its own for 127.0.0.1:
    assert server.request("POST", "/v1/chat/completions", {}, {"Content-Type": "text/plain"})[0] == 415
    assert server.request("GET", "/v1/models", headers={"Host": "evil.example"})[0] == 403
    assert server.request("GET", "/v1/models", headers={"Origin": "http://evil.example"})[0] == 403
    assert server.request("GET", "/v1/models", headers={"Origin": "null"})[0] == 403
    assert server.request("GET", "/v1/models", headers={"Host": "localhost:1"})[0] == 200


# Many at a time


def test_a_full_queue_is_429_and_who_leaves_makes_room(server):
    server.wait_for(running=0, waiting=0)
    open_ = [server.long_stream() for _ in range(3)]  # one runs, two wait
    server.wait_for(running=1, waiting=2)
    with pytest.raises(openai.RateLimitError) as refused:
        server.chat()
    assert 1 <= int(refused.value.response.headers["Retry-After"]) <= 60
    assert refused.value.code == "queue_full"
    open_[1][0].close()  # one that waits
    open_[1][1].close()
    server.wait_for(3, running=1, waiting=1)
    for connection, response in (open_[0], open_[2]):
        connection.close()
        response.close()
    server.wait_for(3, running=0, waiting=0)
    assert server.chat().choices


def test_an_answer_that_nobody_waits_for_is_given_up(server):
    server.wait_for(running=0, waiting=0)
    connection = server.connection()
    body = {"messages": [{"role": "user", "content": "长"}], "max_tokens": 3500, "logit_bias": NO_END}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    server.wait_for(running=1)
    connection.close()
    server.wait_for(3, running=0)


def test_a_slow_reader_holds_up_nobody(server):
    """Megabytes of events, more than the sockets between hold, of which nothing is read at first."""
    server.wait_for(running=0, waiting=0)
    body = {"messages": [{"role": "user", "content": "长"}], "max_tokens": 3500, "logit_bias": NO_END, "stream": True,
            "logprobs": True, "top_logprobs": 20}  # fmt: skip
    slow = server.connection()
    slow.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    server.wait_for(running=1)
    assert server.chat().choices  # after the slow one's answer was made
    server.wait_for(running=0)
    raw = slow.getresponse().read()
    assert len(raw) > 4 << 20
    assert raw.endswith(b"data: [DONE]\n\n")
    assert sum(len(event["choices"][0]["logprobs"]["content"]) for line in raw.decode().splitlines()
               if line.startswith("data: {") and (event := json.loads(line[6:]))["choices"][0]["logprobs"]) > 3400  # fmt: skip


def test_told_to_stop_it_ends_running_answers_and_refuses_those_who_wait(model_path):
    with running(model_path) as server:
        connection, response = server.long_stream(4000)
        response.read(2000)
        _, waiting = server.long_stream()
        server.wait_for(running=1, waiting=1)
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        rest = response.read().decode()
        assert re.search(r'"finish_reason":"length"}\]}\n\ndata: \[DONE\]\n\n$', rest), rest[-300:]
        refused = waiting.read().decode()
        assert '"code":"stopping"' in refused and refused.endswith("data: [DONE]\n\n")
        out, errors = server.process.communicate(timeout=10)
        assert time.monotonic() - started < 6
        assert (server.process.returncode, out, errors) == (0, "", "")
        connection.close()


def test_ctrl_c_is_no_failure(model_path):
    with running(model_path) as server:
        server.chat()
        server.process.send_signal(signal.SIGINT)
        assert server.process.communicate(timeout=10) == ("", "")
        assert server.process.returncode == 0


def test_load(model_path):
    """Slow readers, dropped connections, a full queue: nothing hangs or grows. The long run is in docs/benchmarks.md."""
    with running(model_path, "--queue", "4") as server:
        server.client().embeddings.create(model=server.model, input="a")
        command = [sys.executable, str(ROOT / "tools" / "load.py"), server.url, "--pid", str(server.process.pid), "--json"]
        first, second = (
            json.loads(
                subprocess.run(
                    [*command, "--requests", "80", "--clients", "10", "--tokens", "16"], stdout=subprocess.PIPE, timeout=60
                ).stdout
            )
            for _ in range(2)
        )
    assert first["failures"] == second["failures"] == []
    assert first["refused"] > 0
    assert second["rss"][-1] - first["rss"][-1] < 8 << 20


# Starting


def test_what_cannot_be_served_is_said_before_the_model_loads(gguf, model_path, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, reason in (
            ([str(model_path), "--port", port], f"port {port} of 127.0.0.1 is in use"),
            ([str(model_path), "--host", "0.0.0.0", "--port", "0"], "--api-key"),
            ([str(model_path), "--host", "no.such.host.invalid", "--port", "0"], "no address of this machine"),
            ([str(tmp_path / "none.gguf"), "--port", "0"], "none.gguf"),
            ([str(gguf(vocab="spm")), "--port", "0"], "has no chat template"),
            ([str(model_path), "--port", "0", "--ctx", "999999999"], "Try --ctx"),
        ):
            result = CliRunner().invoke(cli, ["serve", *arguments], env={"CNQ_API_KEY": ""})
            assert result.exit_code == 1, result.output
            assert reason in result.output
            assert len(result.output.splitlines()) == 1


def test_the_key_may_come_from_the_environment(model_path, monkeypatch):
    monkeypatch.setenv("CNQ_API_KEY", "from-outside")
    with running(model_path) as server:
        assert server.request("GET", "/v1/models")[0] == 401
        assert server.client("from-outside").models.list().data


def test_the_async_client_gets_many_streams_at_once(server):
    async def ask():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=8)
        async with client:

            async def one(n):
                stream = await client.chat.completions.create(
                    model=server.model,
                    messages=[{"role": "user", "content": QUESTIONS[n % 4]}],
                    temperature=0,
                    max_tokens=20,
                    stream=True,
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(n) for n in range(3)))

    assert asyncio.run(ask()) == [server.chat(q).choices[0].message.content for q in QUESTIONS[:3]]
