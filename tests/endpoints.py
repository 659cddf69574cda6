"""A judge on a port of this machine, for tests: a tiny HTTP server that answers by rule, or fails by rule."""

import contextlib
import json
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD, SURE = "good", 0.9  # the word of the better response; the letter's probability
UNRELATED = {"token": "The", "logprob": math.log(0.01)}


class Endpoint:
    """Speaks as an OpenAI-compatible server, vLLM's pooling API or an OpenRLHF reward server do.

    `asked` has every request's path, body and headers. `fails(request number, body)` says how one goes wrong:
    a status, or (status, message, headers), or "garbage", "hang up", "no answer"; None: it does not.
    `endings` are the verdicts for A and for B; `logprobs` False: it gives none.
    """

    def __init__(
        self, endings=("<answer>\nA\n</answer>", "<answer>\nB\n</answer>"), logprobs=True, fails=None
    ):
        self.endings, self.logprobs, self.fails = endings, logprobs, fails or (lambda number, body: None)
        self.asked, self.lock, self.thinking, self.change = [], threading.Lock(), "", lambda answer: answer
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.server.daemon_threads = True
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path, body):
        if path.endswith("/chat/completions"):
            return self.change(self.verdict(body))
        if path.endswith("/get_reward"):
            return {"rewards": [float(GOOD in body["query"][0])]}
        score = 2.0 if GOOD in body["messages"][-1]["content"] else -1.0
        if path.endswith("/classify"):
            return {"data": [{"index": 0, "label": None, "probs": [score], "num_classes": 1}]}
        return {"data": [{"index": 0, "object": "pooling", "data": [[0.0], [score]]}]}

    def verdict(self, body):
        shown = re.search(
            r"\[Response A\]\n(.*?)\n\[End of Response A\]", body["messages"][0]["content"], re.DOTALL
        )
        first = (
            shown[1] if shown else {each["role"]: each["content"] for each in body["messages"]}["response_1"]
        )
        side = 0 if GOOD in first else 1
        written = "" if body.get("max_tokens") == 1 else "<think>\nFor a reason.\n</think>\n"
        text = written + self.endings[side]
        message = {"role": "assistant", "content": text}
        if self.thinking:
            message = {"content": self.endings[side], "reasoning_content": self.thinking}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        pieces = re.findall(r"[A-Za-z]+|\d|\s+|[^\w\s]", message["content"])
        if self.logprobs and body.get("logprobs"):
            differ = next(i for i, (a, b) in enumerate(zip(*self.endings, strict=True)) if a != b)
            place = len(message["content"]) - len(self.endings[side]) + differ
            choice["logprobs"] = {"content": spelled(pieces, place, self.endings, differ)}
        return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": len(pieces)}}


def spelled(pieces, place, endings, differ):
    """Each piece's log-probabilities: at the letter's place, of both letters."""
    rows, position = [], 0
    for piece in pieces:
        row = {"token": piece, "bytes": list(piece.encode()), "logprob": math.log(SURE), "top_logprobs": []}
        if position <= place < position + len(piece):
            other = next(e[differ] for e in endings if e[differ] != piece)
            row["top_logprobs"] = [{"token": other, "logprob": math.log(1 - SURE)}, UNRELATED]
        rows.append(row)
        position += len(piece)
    return rows


def handler(endpoint):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                endpoint.asked.append((self.path, body, dict(self.headers)))
                number = len(endpoint.asked)
            with contextlib.suppress(OSError):  # whoever asked has gone
                self.reply(endpoint.fails(number, body), body)

        def reply(self, failure, body):
            if failure == "hang up":
                self.connection.close()
            elif failure == "no answer":
                time.sleep(2)
            elif failure == "garbage":
                self.send(200, b'{"choices": [{"mess')
            elif failure:
                status, said, headers = failure if isinstance(failure, tuple) else (failure, "no", {})
                self.send(status, json.dumps({"error": {"message": said}}).encode(), headers)
            else:
                self.send(200, json.dumps(endpoint.answer(self.path, body)).encode())

        def send(self, status, content, headers=None):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    return Handler
