// The chat page: a conversation is a tree of messages, kept in this browser; answers come from the
// server's OpenAI-compatible API as server-sent events.
//
//   what is typed -> a node of the tree -> POST /v1/chat/completions -> events -> nodes -> the screen

import { make, markdown } from "/page/markdown.js";

const by = (id) => document.getElementById(id);
const STORE = "open-instruct-conversations";
const SETTINGS = "open-instruct-settings";
const ALTERNATIVES = 5; // other tokens that the token view shows

// name, label, lowest, highest, step, default
const SLIDERS = [
  ["temperature", "Temperature", 0, 2, 0.05, 0.7],
  ["top_p", "Top p", 0.01, 1, 0.01, 1],
  ["top_k", "Top k (0: all)", 0, 200, 1, 0],
  ["min_p", "Min p", 0, 1, 0.01, 0],
  ["max_tokens", "Longest answer", 1, 4096, 1, 512],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, 0],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, 0],
];

// ---------------------------------------------------------------- what is kept

const defaults = () => ({
  ...Object.fromEntries(SLIDERS.map(([name, , , , , value]) => [name, value])),
  seed: "",
  stop: "",
  theme: "",
  showTokens: false,
});
const state = {
  conversations: load(STORE, []),
  settings: { ...defaults(), ...load(SETTINGS, {}) },
  current: null, // a conversation
  models: [],
  running: new Map(), // node id -> AbortController
  editing: null, // node id
};

function load(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function save() {
  try {
    // Probabilities of tokens are many and soon stale: they live as long as the page.
    const bare = (name, value) => (name === "tokens" ? undefined : value);
    localStorage.setItem(STORE, JSON.stringify(state.conversations, bare));
    localStorage.setItem(SETTINGS, JSON.stringify(state.settings));
  } catch (error) {
    say(`This browser keeps no more conversations (${error.name}). Export and delete some.`, true);
  }
}

function say(text, isError = false) {
  by("status").textContent = text;
  by("status").classList.toggle("error", isError);
}

// ---------------------------------------------------------------- the tree of a conversation
// A node is {id, parent, role, content, model?, facts?, tokens?, error?}; conversation.chosen says
// which child of a node is shown, conversation.pairs which two answers wait for a vote.

const newId = () => crypto.getRandomValues(new Uint32Array(2)).join("-");
const children = (conversation, parent) => conversation.nodes.filter((node) => node.parent === parent);

function path(conversation) {
  const nodes = [];
  let parent = null;
  for (;;) {
    const options = children(conversation, parent);
    if (!options.length) return nodes;
    const node = options.find((option) => option.id === conversation.chosen[parent]) ?? options.at(-1);
    nodes.push(node);
    parent = node.id;
  }
}

function add(conversation, parent, role, content, more = {}) {
  const node = { id: newId(), parent, role, content, ...more };
  conversation.nodes.push(node);
  conversation.chosen[parent] = node.id;
  return node;
}

const turn = ({ role, content }) => ({ role, content });

function messagesTo(conversation, node) {
  const turns = [];
  for (let at = node; at; at = conversation.nodes.find((other) => other.id === at.parent)) turns.unshift(turn(at));
  return conversation.system ? [{ role: "system", content: conversation.system }, ...turns] : turns;
}

function newConversation() {
  const conversation = { id: newId(), title: "", system: by("system").value, nodes: [], chosen: {}, pairs: {} };
  state.conversations.unshift(conversation);
  open(conversation);
  return conversation;
}

function open(conversation) {
  state.current = conversation;
  state.editing = null;
  by("system").value = conversation.system;
  by("context").textContent = "";
  by("list-panel").classList.remove("open");
  by("toggle-list").setAttribute("aria-expanded", "false");
  save();
  showList();
  show();
}

// ---------------------------------------------------------------- the server

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(url, body, signal) {
  const method = body ? "POST" : "GET";
  const content = body && JSON.stringify(body);
  const response = await fetch(url, { method, headers: headers(), body: content, signal }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server does not answer. Is it still running?");
  });
  if (response.status === 401) {
    by("key-dialog").showModal();
    throw new Error("The API key is missing or wrong.");
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw new Error(answer?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

/** The JSON of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer broke off: the server has gone.");
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function requestBody(model, messages) {
  const { settings } = state;
  const body = { model, messages };
  for (const [name] of SLIDERS) body[name] = settings[name];
  if (settings.seed !== "") body.seed = Number(settings.seed);
  if (settings.stop !== "") body.stop = settings.stop;
  if (settings.showTokens) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  return body;
}

async function answer(conversation, question, model) {
  const node = add(conversation, question.id, "assistant", "", { model });
  const controller = new AbortController();
  state.running.set(node.id, controller);
  show(true);
  const began = performance.now();
  let first = 0;
  let usage = null;
  let pieces = 0;
  try {
    const body = requestBody(model, messagesTo(conversation, question));
    const response = await ask(
      "/v1/chat/completions",
      { ...body, stream: true, stream_options: { include_usage: true } },
      controller.signal,
    );
    for await (const event of events(response)) {
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.delta.content) {
        first ||= performance.now();
        pieces++;
        node.content += choice.delta.content;
      }
      if (choice.logprobs) (node.tokens ??= []).push(...choice.logprobs.content);
      if (choice.finish_reason === "length") node.note = "cut at the longest length";
      showSoon(node);
    }
  } catch (error) {
    if (controller.signal.aborted) node.note = "stopped";
    else node.error = error.message;
  }
  const seconds = (performance.now() - (first || began)) / 1000;
  const number = usage?.completion_tokens ?? pieces;
  node.facts = [
    `${number} tokens`,
    first && number >= 5 ? `${((number - 1) / Math.max(seconds, 0.001)).toFixed(1)} tokens/s` : null,
    first ? `first after ${Math.round(first - began)} ms` : null,
    node.note,
  ].filter(Boolean).join(" · ");
  state.running.delete(node.id);
  if (usage) {
    const context = state.models.find((known) => known.id === model)?.max_model_len;
    by("context").textContent = `${usage.total_tokens} of ${context} tokens of the context are used`;
  }
  save();
  show();
  return node;
}

async function answerAll(conversation, question) {
  say("");
  const models = [by("model").value, by("other").value].filter(Boolean);
  const answers = models.map((model) => answer(conversation, question, model));
  if (answers.length === 2) {
    const pair = children(conversation, question.id).slice(-2);
    conversation.pairs[question.id] = pair.map((node) => node.id);
    show(true);
  }
  const nodes = await Promise.all(answers);
  const failed = nodes.find((node) => node.error);
  const isSame = nodes.length === 2 && nodes[0].content === nodes[1].content;
  if (failed) say(failed.error, true);
  else say(isSame ? "The two answers are the same: there is nothing to prefer." : "The answer is complete.");
}

async function vote(conversation, question, chosen, rejected) {
  try {
    const body = {
      prompt: messagesTo(conversation, question),
      chosen: chosen.content,
      rejected: rejected.content,
      chosen_model: chosen.model,
      rejected_model: rejected.model,
    };
    const { file } = await (await ask("/page/vote", body)).json();
    settle(conversation, question, chosen);
    say(`Your vote was added to ${file}.`);
  } catch (error) {
    say(error.message, true);
  }
}

function settle(conversation, question, chosen) {
  conversation.chosen[question.id] = chosen.id;
  delete conversation.pairs[question.id];
  save();
  show();
  by("input").focus();
}

// ---------------------------------------------------------------- the screen

let due = new Set(); // nodes that have grown since the last frame

const isAtEnd = (box) => box.scrollHeight - box.scrollTop - box.clientHeight < 80;

/** Redraw one answer at the next frame, however many tokens came since. */
function showSoon(node) {
  if (!due.size) requestAnimationFrame(() => {
    const grown = due;
    due = new Set();
    const messages = by("messages");
    const toEnd = isAtEnd(messages);
    for (const one of grown) {
      const body = messages.querySelector(`[data-id="${one.id}"] .body`);
      if (body) fill(body, one);
    }
    if (toEnd) messages.scrollTop = messages.scrollHeight;
  });
  due.add(node);
}

function fill(body, node) {
  const isTokens = state.settings.showTokens && node.tokens;
  body.classList.toggle("plain", Boolean(isTokens) || node.role === "user");
  body.classList.toggle("writing", state.running.has(node.id));
  if (isTokens) body.replaceChildren(...tokenSpans(node.tokens));
  else if (node.role === "user") body.replaceChildren(node.content);
  else body.replaceChildren(...markdown(node.content));
}

function show(toEnd = false) {
  const conversation = state.current;
  const shown = [];
  if (conversation) {
    for (const node of path(conversation)) {
      const pair = conversation.pairs[node.parent];
      if (pair?.includes(node.id)) {
        shown.push(pairOf(conversation, pair));
        break; // what follows depends on which is preferred
      }
      shown.push(article(conversation, node));
    }
  }
  const messages = by("messages");
  const place = messages.scrollTop;
  toEnd ||= isAtEnd(messages);
  hideTip();
  messages.replaceChildren(...shown);
  messages.scrollTop = toEnd ? messages.scrollHeight : place;
  const isRunning = state.running.size > 0;
  messages.setAttribute("aria-busy", String(isRunning));
  const waits = Boolean(conversation && Object.keys(conversation.pairs).some((id) =>
    path(conversation).some((node) => node.id === id)));
  by("stop").hidden = !isRunning;
  by("send").hidden = isRunning;
  by("send").disabled = waits;
  for (const id of ["model", "other"]) by(id).disabled = isRunning;
}

function pairOf(conversation, ids) {
  const [left, right] = ids.map((id) => conversation.nodes.find((node) => node.id === id));
  const question = conversation.nodes.find((node) => node.id === left.parent);
  const isRunning = ids.some((id) => state.running.has(id));
  const canVote = !isRunning && left.content.trim() && right.content.trim() && left.content !== right.content;
  const button = (text, action, disabled) => make("button", { type: "button", onclick: action, disabled }, text);
  const votes = make("div", { class: "votes", role: "group", "aria-label": "Which answer is better?" },
    button("◀ This one is better", () => vote(conversation, question, left, right), !canVote),
    button("No vote, go on with the left", () => settle(conversation, question, left), isRunning),
    button("This one is better ▶", () => vote(conversation, question, right, left), !canVote));
  return make("div", { class: "pair" }, article(conversation, left), article(conversation, right), votes);
}

function article(conversation, node) {
  const name = node.role === "user" ? "You" : node.model ?? "Answer";
  const body = make("div", { class: "body" });
  const element = make("article", { class: node.role, "data-id": node.id, "aria-label": name },
    make("h2", {}, name), body);
  if (state.editing === node.id) {
    const area = make("textarea", { class: "edit", "aria-label": "Edit the message" });
    area.value = node.content;
    const done = () => edit(conversation, node, area.value);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); done(); }
    });
    body.append(area, make("div", { class: "tools" },
      make("button", { type: "button", onclick: done }, "Send"),
      make("button", { type: "button", onclick: () => { state.editing = null; show(); } }, "Cancel")));
    queueMicrotask(() => area.focus());
    return element;
  }
  fill(body, node);
  if (state.running.has(node.id)) return element;
  const tools = make("div", { class: "tools" });
  const tool = (text, label, action) =>
    tools.append(make("button", { type: "button", "aria-label": label, title: label, onclick: action }, text));
  const isPaired = conversation.pairs[node.parent]?.includes(node.id);
  const siblings = children(conversation, node.parent);
  if (siblings.length > 1 && !isPaired) {
    const place = siblings.indexOf(node);
    const go = (step) => () => {
      conversation.chosen[node.parent] = siblings[(place + step + siblings.length) % siblings.length].id;
      save();
      show();
    };
    tool("‹", "The branch before", go(-1));
    tools.append(`${place + 1}/${siblings.length}`);
    tool("›", "The next branch", go(1));
  }
  if (!state.running.size) {
    if (node.role === "user") tool("Edit", "Edit this message and ask again", () => { state.editing = node.id; show(); });
    else if (!isPaired) tool("Regenerate", "Ask for another answer", () => regenerate(conversation, node));
  }
  tool("Copy", "Copy this message", () => navigator.clipboard.writeText(node.content));
  if (node.facts) tools.append(make("span", { class: "facts" }, node.facts));
  if (node.error) tools.append(make("span", { class: "facts" }, `failed: ${node.error}`));
  element.append(tools);
  return element;
}

function edit(conversation, node, text) {
  state.editing = null;
  if (!text.trim()) return show();
  return answerAll(conversation, add(conversation, node.parent, "user", text));
}

function regenerate(conversation, node) {
  return answerAll(conversation, conversation.nodes.find((other) => other.id === node.parent));
}

function showList() {
  const items = state.conversations.map((conversation) => {
    const isCurrent = conversation === state.current;
    return make("li", {},
      make("button", { type: "button", "aria-current": isCurrent ? "true" : null, onclick: () => open(conversation) },
        conversation.title || "New conversation"),
      make("button", { type: "button", "aria-label": `Delete ${conversation.title || "this conversation"}`,
        onclick: () => remove(conversation) }, "×"));
  });
  by("list").replaceChildren(...items);
}

function remove(conversation) {
  if (!confirm("Delete this conversation from this browser?")) return;
  state.conversations = state.conversations.filter((other) => other !== conversation);
  if (state.current === conversation) state.current = state.conversations[0] ?? null;
  if (state.current) open(state.current);
  else newConversation();
}

// ---------------------------------------------------------------- tokens and the prompt

function tokenSpans(tokens) {
  const spans = tokens.map((token, place) => {
    const chance = Math.exp(token.logprob);
    const sure = chance < 0.1 ? 0 : chance < 0.4 ? 1 : chance < 0.8 ? 2 : 3;
    const span = make("span", {
      class: `token sure${sure}`,
      tabindex: place ? "-1" : "0",
      "aria-label": `${token.token}, ${percent(token.logprob)}`,
    }, token.token);
    const showTip = () => tip(span, token);
    span.addEventListener("mouseenter", showTip);
    span.addEventListener("focus", showTip);
    span.addEventListener("mouseleave", hideTip);
    span.addEventListener("blur", hideTip);
    span.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) spans[place + step]?.focus();
    });
    return span;
  });
  return spans;
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

function tip(span, token) {
  const line = ({ token: text, logprob }) => `${percent(logprob).padStart(7)}  ${JSON.stringify(text)}`;
  const element = by("tip");
  element.textContent = [`taken: ${line(token).trim()}`, "likeliest:", ...token.top_logprobs.map(line)].join("\n");
  element.hidden = false;
  const place = span.getBoundingClientRect();
  const below = place.bottom + element.offsetHeight + 8 < innerHeight;
  element.style.left = `${Math.max(4, Math.min(place.left, innerWidth - element.offsetWidth - 8))}px`;
  element.style.top = `${below ? place.bottom + 4 : place.top - element.offsetHeight - 4}px`;
}

function hideTip() {
  by("tip").hidden = true;
}

async function showPrompt() {
  const conversation = state.current;
  const typed = by("input").value;
  const nodes = path(conversation);
  const last = nodes.findLast((node) => node.role === "user");
  const messages = typed.trim()
    ? [...(nodes.length ? messagesTo(conversation, nodes.at(-1)) : messagesTo(conversation, null)),
      { role: "user", content: typed }]
    : last ? messagesTo(conversation, last) : [];
  if (!messages.length) return say("Type a message first: then its prompt can be shown.");
  try {
    const body = { model: by("model").value, messages };
    const prompt = await (await ask("/page/prompt", body)).json();
    by("prompt-facts").textContent =
      `${prompt.tokens.length} tokens of ${prompt.context}; control tokens are coloured.`;
    const isControl = prompt.tokens.some((token) => token.is_control);
    by("prompt-text").replaceChildren(...(isControl ? pieces(prompt) : [prompt.text]));
    by("prompt-dialog").showModal();
  } catch (error) {
    say(error.message, true);
  }
}

/** The text with its control tokens marked, found in order: text that only spells one is not. */
function pieces({ text, tokens }) {
  const nodes = [];
  let run = [];
  const flush = () => {
    if (run.length) nodes.push(new TextDecoder().decode(new Uint8Array(run.flat())));
    run = [];
  };
  for (const token of tokens) {
    if (token.is_control) {
      flush();
      nodes.push(make("span", { class: "control" }, token.text));
    } else run.push(token.bytes);
  }
  flush();
  return nodes;
}

// ---------------------------------------------------------------- files

function rowOf(conversation) {
  const nodes = path(conversation);
  while (nodes.length && nodes.at(-1).role !== "assistant") nodes.pop();
  return nodes.length ? { messages: messagesTo(conversation, nodes.at(-1)) } : null;
}

function exportRows(conversations) {
  const rows = conversations.map(rowOf).filter(Boolean);
  if (!rows.length) return say("There is no answered message to export.");
  const text = rows.map((row) => JSON.stringify(row) + "\n").join("");
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  make("a", { href: url, download: "conversations.jsonl" }).click();
  URL.revokeObjectURL(url);
  const left = conversations.length - rows.length;
  say(`${rows.length} exported, the branches that are shown.${left ? ` ${left} without an answer left out.` : ""}`);
}

async function importRows(file) {
  const found = [];
  const lines = (await file.text()).split("\n");
  for (const [place, line] of lines.entries()) {
    if (!line.trim()) continue;
    try {
      found.push(conversationOf(JSON.parse(line)));
    } catch (error) {
      return say(`${file.name}, line ${place + 1}: ${error.message} Nothing was imported.`, true);
    }
  }
  if (!found.length) return say(`${file.name} holds no conversations.`, true);
  state.conversations.unshift(...found);
  open(found[0]);
  say(`${found.length} imported.`);
}

function conversationOf(row) {
  if (!Array.isArray(row?.messages)) throw new Error("there is no list of messages.");
  const conversation = { id: newId(), title: "", system: "", nodes: [], chosen: {}, pairs: {} };
  let parent = null;
  for (const [place, message] of row.messages.entries()) {
    const { role, content } = message ?? {};
    if (typeof content !== "string") throw new Error(`message ${place + 1} has no text.`);
    if (role === "system" && place === 0) conversation.system = content;
    else if (role === "user" || role === "assistant") parent = add(conversation, parent, role, content).id;
    else throw new Error(`message ${place + 1} has the role ${JSON.stringify(role)}.`);
  }
  if (!conversation.nodes.length) throw new Error("there is no turn.");
  conversation.title = titleOf(conversation.nodes[0].content);
  return conversation;
}

const titleOf = (text) => text.trim().replace(/\s+/g, " ").slice(0, 60);

// ---------------------------------------------------------------- what the user does

function send(event) {
  event?.preventDefault();
  const text = by("input").value;
  if (!text.trim() || state.running.size || by("send").disabled) return;
  const conversation = state.current ?? newConversation();
  const nodes = path(conversation);
  const last = nodes.at(-1);
  if (last?.role === "assistant" && !last.content) {
    return say("The last answer is empty or failed: regenerate it, or edit the question.", true);
  }
  conversation.title ||= titleOf(text);
  by("input").value = "";
  const parent = last?.role === "user" ? last.parent : last?.id ?? null;
  answerAll(conversation, add(conversation, parent, "user", text));
  showList();
  save();
}

function stop() {
  for (const controller of state.running.values()) controller.abort();
}

function buildSettings() {
  const rows = SLIDERS.map(([name, label, min, max, step]) => {
    const shown = make("output", {}, String(state.settings[name]));
    const input = make("input", { type: "range", id: `slider-${name}`, min, max, step, "aria-label": label });
    input.value = state.settings[name];
    input.addEventListener("input", () => {
      state.settings[name] = Number(input.value);
      shown.textContent = input.value;
      save();
    });
    return make("div", { class: "slider" }, make("span", {}, label), shown, input);
  });
  by("sliders").replaceChildren(...rows);
  by("seed").value = state.settings.seed;
  by("stop-text").value = state.settings.stop;
}

/** No answer may ask for more than the model's context: the slider ends where it does. */
function fitLengths() {
  const contexts = [by("model").value, by("other").value]
    .map((id) => state.models.find((model) => model.id === id)?.max_model_len)
    .filter(Boolean);
  const limit = Math.max(1, Math.floor(Math.min(...contexts) / 2));
  const slider = SLIDERS.find(([name]) => name === "max_tokens");
  slider[3] = limit;
  state.settings.max_tokens = Math.min(state.settings.max_tokens, limit);
  buildSettings();
}

function applyTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = state.settings.theme || system;
}

function press(id, isOn) {
  by(id).setAttribute("aria-pressed", String(isOn));
}

async function loadModels() {
  const { data } = await (await ask("/v1/models")).json();
  state.models = data.filter((model) => model.has_chat_template);
  const option = ({ id }) => make("option", { value: id }, id.split("/").slice(-2).join("/"));
  by("model").replaceChildren(...state.models.map(option));
  by("other").replaceChildren(make("option", { value: "" }, "nothing"), ...state.models.map(option));
  if (!state.models.length) say("None of the models served was tuned on dialogues.", true);
  fitLengths();
}

function listen() {
  by("composer").addEventListener("submit", send);
  by("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { hideTip(); stop(); }
  });
  by("stop").addEventListener("click", stop);
  by("new").addEventListener("click", () => { newConversation(); by("input").focus(); });
  by("show-prompt").addEventListener("click", showPrompt);
  by("close-prompt").addEventListener("click", () => by("prompt-dialog").close());
  by("export").addEventListener("click", () => exportRows([state.current]));
  by("export-all").addEventListener("click", () => exportRows(state.conversations));
  by("import").addEventListener("click", () => by("file").click());
  by("file").addEventListener("change", async () => {
    const [file] = by("file").files;
    if (file) await importRows(file);
    by("file").value = "";
  });
  by("toggle-list").addEventListener("click", () => {
    const isOpen = by("list-panel").classList.toggle("open");
    by("toggle-list").setAttribute("aria-expanded", String(isOpen));
  });
  by("toggle-settings").addEventListener("click", () => {
    by("settings").hidden = !by("settings").hidden;
    by("toggle-settings").setAttribute("aria-expanded", String(!by("settings").hidden));
  });
  by("toggle-tokens").addEventListener("click", () => {
    state.settings.showTokens = !state.settings.showTokens;
    press("toggle-tokens", state.settings.showTokens);
    save();
    show();
  });
  by("toggle-theme").addEventListener("click", () => {
    state.settings.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    applyTheme();
    save();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
  by("system").addEventListener("input", () => { state.current.system = by("system").value; save(); });
  by("seed").addEventListener("input", () => { state.settings.seed = by("seed").value; save(); });
  by("stop-text").addEventListener("input", () => { state.settings.stop = by("stop-text").value; save(); });
  by("reset-settings").addEventListener("click", () => {
    const { theme, showTokens } = state.settings;
    state.settings = { ...defaults(), theme, showTokens };
    fitLengths();
    save();
  });
  by("model").addEventListener("change", fitLengths);
  by("other").addEventListener("change", fitLengths);
  by("key-form").addEventListener("submit", () => {
    sessionStorage.setItem("key", by("key").value);
    loadModels().catch((error) => say(error.message, true));
  });
}

applyTheme();
press("toggle-tokens", state.settings.showTokens);
listen();
buildSettings();
if (state.conversations.length) open(state.conversations[0]);
else newConversation();
loadModels().catch((error) => say(error.message, true));
