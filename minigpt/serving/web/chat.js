// The script of the chat page: a conversation with /v1/chat/completions. Model output is only ever set as textContent.
"use strict";

const $ = (id) => document.getElementById(id);
const turns = []; // { question, answer, element }; the newest last
let running = null; // the AbortController of the running answer

// ---- settings: in localStorage; the API key in sessionStorage, until the tab is closed

const SETTINGS = ["temperature", "top_p", "max_tokens", "system"];
const THEMES = ["auto", "light", "dark"];

for (const name of SETTINGS) {
  $(name).value = localStorage.getItem(name) ?? "";
  $(name).addEventListener("input", () => localStorage.setItem(name, $(name).value));
}

function setTheme(theme) {
  localStorage.setItem("theme", theme);
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}
setTheme(THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto");
$("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(localStorage.getItem("theme")) + 1) % THEMES.length]);
});

function showSettings(shown) {
  $("settings").hidden = !shown;
  $("settings-button").setAttribute("aria-expanded", String(shown));
  (shown ? $("temperature") : $("settings-button")).focus();
}
$("settings-button").addEventListener("click", () => showSettings($("settings").hidden));

// ---- the server

class RefusedError extends Error {}

async function send(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const json = body && { "Content-Type": "application/json" };
    const response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers: { ...json, ...(key && { Authorization: `Bearer ${key}` }) },
      body: body && JSON.stringify(body),
      signal,
    });
    if (response.ok) return response;
    if (response.status !== 401) {
      const text = await response.text();
      let message;
      try {
        message = JSON.parse(text).error.message;
      } catch {
        message = response.statusText;
      }
      throw new RefusedError(`The server refused (${response.status}): ${message}`);
    }
    await askForKey(key !== null);
  }
}

function askForKey(wrong) {
  $("key-wrong").textContent = wrong ? "Wrong key." : "";
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
  return new Promise((resolve, reject) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("key", $("key").value);
      $("key-dialog").close("given");
      resolve();
    };
    $("key-dialog").onclose = () => {
      if ($("key-dialog").returnValue !== "given") reject(new RefusedError("The server needs an API key."));
      $("key-dialog").returnValue = "";
    };
  });
}

async function* events(response) {
  const decoder = new TextDecoder();
  let text = "";
  for (const reader = response.body.getReader(); ; ) {
    const { value, done } = await reader.read();
    text += decoder.decode(value, { stream: !done });
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new RefusedError(`The server ended the answer: ${event.error.message}`);
      yield event;
    }
    if (done) throw new TypeError("the stream ended early");
  }
}

let waiting = false;
async function waitForServer() {
  if (waiting) return;
  waiting = true;
  setStatus("The server cannot be reached. Waiting for it to come back; your conversation is kept.");
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1500));
    try {
      if ((await fetch("health")).ok) break;
    } catch {
      // still unreachable
    }
  }
  waiting = false;
  setStatus(turns.length ? "The server is back. Press Retry to ask again." : "The server is back.");
}

// ---- the conversation

function messages(count) {
  const system = $("system").value.trim();
  const answered = turns.slice(0, count).filter((turn) => turn.answer);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...answered.flatMap((turn) => [
      { role: "user", content: turn.question },
      { role: "assistant", content: turn.answer },
    ]),
  ];
}

function request(turn) {
  const body = {
    messages: [...messages(turns.indexOf(turn)), { role: "user", content: turn.question }],
    truncation: "auto",
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    const field = $(name);
    if (!field.checkValidity()) {
      throw new RefusedError(`${field.labels[0].innerText.trim()}: ${field.validationMessage}`);
    }
    if (field.value !== "") body[name] = Number(field.value);
  }
  return body;
}

async function answer(turn) {
  const controller = new AbortController();
  const start = performance.now();
  running = controller;
  const [output, notes] = [turn.element.querySelector(".answer"), turn.element.querySelector(".notes")];
  const note = (text, bad = false) => notes.append(element("p", bad ? "note bad" : "note", text));
  const previous = turn.answer;
  let text = "";
  notes.replaceChildren();
  output.textContent = "";
  busy(turn, true);
  setStatus("Answering");
  try {
    const response = await send("v1/chat/completions", request(turn), controller.signal);
    for await (const event of events(response)) {
      const choice = event.choices[0];
      if (choice?.delta.role) noteTruncated(event.truncated, note);
      text += choice?.delta.content ?? "";
      const follow = atEnd(); // do not scroll if the reader has scrolled up
      output.textContent = text;
      if (follow) scrollToEnd();
      if (choice?.finish_reason === "length") note("The answer reached the token limit.");
      if (event.usage) setStatus(speed(event.usage.completion_tokens, performance.now() - start));
    }
    turn.answer = text;
    if (!text) note("Empty answer: the model ended it at once.");
  } catch (error) {
    turn.answer = text || previous;
    output.textContent = turn.answer;
    if (error.name === "AbortError") {
      note(text ? "Stopped." : "Stopped before the first token.");
      setStatus("Stopped");
    } else if (error instanceof RefusedError) {
      note(error.message, true);
      setStatus("");
    } else {
      note(text ? "The connection was lost: the answer is incomplete." : "The server could not be reached.", true);
      waitForServer();
    }
  } finally {
    running = null;
    busy(turn, false);
  }
}

function noteTruncated(truncated, note) {
  const { turns_dropped: dropped, tokens_cut: cut } = truncated ?? {};
  const turns = dropped === 1 ? "turn was" : `${dropped} turns were`;
  if (dropped) note(`The context is full: the oldest ${turns} left out.`);
  if (cut) note(`The message is too long for the context: its first ${cut} tokens were cut.`);
}

function speed(tokens, ms) {
  return `${tokens} token${tokens === 1 ? "" : "s"}, ${((tokens / ms) * 1000).toFixed(1)} a second`;
}

function busy(turn, on) {
  turn.element.classList.toggle("busy", on);
  turn.element.querySelector(".reply").setAttribute("aria-busy", String(on));
  const focused = document.activeElement;
  $("send").hidden = on;
  $("stop").hidden = !on;
  for (const other of turns) {
    other.element.querySelector(".actions").hidden = on && other === turn;
    other.element.querySelector(".retry").hidden = on || other !== turns.at(-1);
    other.element.querySelector(".copy").hidden = !other.answer;
  }
  if (focused?.offsetParent === null || focused === document.body) $("question").focus();
  scrollToEnd();
}

function addTurn(question) {
  const turn = { question, answer: "", element: element("li", "turn") };
  const reply = element("div", "reply");
  const actions = element("div", "actions");
  const copy = element("button", "copy", "Copy");
  const retry = element("button", "retry", "Retry");
  copy.type = retry.type = "button";
  copy.addEventListener("click", () => copyText(turn.answer));
  retry.addEventListener("click", () => running || answer(turn));
  actions.append(copy, retry);
  const heading = (text) => element("h2", "visually-hidden", text);
  reply.setAttribute("aria-live", "polite");
  reply.append(heading("Answer"), element("p", "message answer"), element("div", "notes"));
  turn.element.append(heading("You"), element("p", "message question", question), reply, actions);
  $("turns").append(turn.element);
  $("empty").hidden = true;
  turns.push(turn);
  return turn;
}

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function setStatus(text) {
  $("status").textContent = text;
}

function atEnd() {
  return $("main").scrollHeight - $("main").scrollTop - $("main").clientHeight < 60;
}

function scrollToEnd() {
  $("main").scrollTop = $("main").scrollHeight;
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text); // exists only over https or on localhost
  } catch {
    const box = element("textarea", "", "");
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
    $("question").focus();
  }
  setStatus("Copied");
}

// ---- events

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  $("question").value = "";
  answer(addTurn(question));
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("key-dialog").open) return;
  if (running) running.abort();
  else if (!$("settings").hidden) showSettings(false);
});
$("new").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  $("turns").replaceChildren();
  $("empty").hidden = false;
  setStatus("");
  $("question").focus();
});
$("export").addEventListener("click", () => {
  const conversation = messages(turns.length);
  if (!conversation.some((message) => message.role === "assistant")) {
    return setStatus("There is no conversation to export yet");
  }
  const link = element("a", "");
  const json = JSON.stringify({ messages: conversation }, null, 2) + "\n";
  link.href = URL.createObjectURL(new Blob([json], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  URL.revokeObjectURL(link.href);
  setStatus("Exported as conversation.json, which chat.py's /load and sft.py --data read");
});

(async () => {
  try {
    $("model").textContent = (await (await send("v1/models")).json()).data[0].id;
    document.title = `${$("model").textContent} - minigpt`;
  } catch (error) {
    if (error instanceof RefusedError) setStatus(error.message);
    else waitForServer();
  }
  $("question").focus();
})();
