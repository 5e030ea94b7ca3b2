// The sample browser: the answers to one task at a time, searched, filtered and paged.
// Whatever a model wrote is put into the page as text, never as markup.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const packs = [...document.querySelectorAll("script.pack")];
  const openTarget = () => {
    const target = location.hash ? byId(location.hash.slice(1)) : null;
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", openTarget);
  openTarget();
  if (!packs.length) return;

  const [ID, KIND, QUESTION, TARGET, OVERLAPS, PROMPTS, ANSWERS] = [0, 1, 2, 3, 4, 5, 6];
  const [TEXT, VERDICT, NOTE, PROMPT, OPTIONS, MORE] = [0, 1, 2, 3, 4, 5];
  const unpacked = new Map();
  let pack = null;
  let found = []; // numbers of the questions that fit
  let pageNumber = 0;

  async function unpack(number) {
    if (!unpacked.has(number)) {
      const bytes = Uint8Array.from(atob(packs[number].textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const content = await new Response(stream).json();
      content.words = content.questions.map(() => null);
      content.leftOut = Number(packs[number].dataset.leftOut);
      unpacked.set(number, content);
    }
    return unpacked.get(number);
  }

  // ---------------------------------------------------------------- which questions

  const whole = (text) => (Array.isArray(text) ? text[0] : text ?? "");

  function wordsOf(number) {
    if (pack.words[number] === null) {
      const question = pack.questions[number];
      const texts = [question[ID], question[QUESTION], question[TARGET]].map(whole);
      for (const answer of question[ANSWERS]) {
        if (!answer) continue;
        texts.push(whole(answer[TEXT]), ...answer[MORE].map(whole));
        for (const option of answer[OPTIONS] ?? []) texts.push(whole(option[0]));
      }
      pack.words[number] = texts.join("\n").toLowerCase();
    }
    return pack.words[number];
  }

  // [group, label, whether a question's verdicts (and overlap) fit]
  function filters() {
    const names = pack.models.map(([name]) => name);
    const listed = [["", "everything", () => true]];
    if (pack.questions.some((q) => q[ANSWERS].some((a) => a && a[VERDICT] !== null))) {
      if (names.length > 1) {
        listed.push(["", "changed between models", (v) => v.includes(true) && v.includes(false)]);
        listed.push(["", "all right", (v) => v.every((one) => one === true)]);
        listed.push(["", "all wrong", (v) => v.every((one) => one === false)]);
      }
      names.forEach((name, n) => {
        listed.push(["one model", `${name} right`, (v) => v[n] === true]);
        listed.push(["one model", `${name} wrong`, (v) => v[n] === false]);
      });
      const pairs = [];
      for (let n = 1; n < names.length; n += 1) {
        for (const m of new Set([0, n - 1])) pairs.push([m, n]);
      }
      for (const [m, n] of pairs) {
        const [one, other] = [names[m], names[n]];
        listed.push(["two models", `${one} wrong, ${other} right`, (v) => v[m] === false && v[n] === true]);
        listed.push(["two models", `${one} right, ${other} wrong`, (v) => v[m] === true && v[n] === false]);
      }
    }
    if (pack.questions.some((q) => q[OVERLAPS] !== null)) {
      listed.push(["training text", "in training text", (v, overlaps) => overlaps === true]);
      listed.push(["training text", "not in training text", (v, overlaps) => overlaps === false]);
    }
    return listed;
  }

  function search() {
    const needle = byId("search").value.trim().toLowerCase();
    const fits = pack.filters[Number(byId("show").value)][2];
    const kind = byId("kind").value;
    found = [];
    pack.questions.forEach((question, number) => {
      const verdicts = question[ANSWERS].map((answer) => (answer ? answer[VERDICT] : null));
      if (kind !== "" && question[KIND] !== kind) return;
      if (!fits(verdicts, question[OVERLAPS])) return;
      if (needle && !wordsOf(number).includes(needle)) return;
      found.push(number);
    });
    turnTo(0);
  }

  // ---------------------------------------------------------------- how they are shown

  function made(tag, className, ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  function shown(text, needle) {
    const element = made("span");
    element.dir = "auto";
    const words = whole(text);
    if (!words) return made("i", "quiet", "(nothing)");
    let end = 0;
    if (needle) {
      const pattern = new RegExp(needle.replace(/[.*+?^${}()|[\]\\\/]/g, "\\$&"), "giu");
      for (const match of words.matchAll(pattern)) {
        element.append(words.slice(end, match.index), made("mark", "", match[0]));
        end = match.index + match[0].length;
      }
    }
    element.append(words.slice(end));
    if (!Array.isArray(text)) return element;
    const rest = ` … and ${text[1].toLocaleString("en")} more characters`;
    return made("span", "", element, made("i", "quiet", rest));
  }

  function folded(label, fill) {
    const element = made("details", "", made("summary", "", label));
    element.addEventListener("toggle", () => {
      if (element.open && element.childElementCount === 1) element.append(fill());
    });
    return element;
  }

  function optionTable(options) {
    const rows = options.map(([text, logprob, isPicked, isGold]) =>
      made(
        "tr",
        isPicked ? "picked" : "",
        made("td", "", isGold ? "✓" : ""),
        made("td", "", shown(text)),
        made("td", "number", logprob === null ? "–" : logprob.toFixed(3)),
      ),
    );
    return made("table", "options", made("tbody", "", ...rows));
  }

  function answerBox(answer, [name, color], needle) {
    const who = made("p", "who", made("i", `dot c${color}`), name);
    if (!answer) return made("div", "answer", who, made("p", "quiet", "not asked"));
    const verdict = answer[VERDICT];
    if (verdict !== null) who.append(made("span", "verdict", verdict ? "✓ right" : "✗ wrong"));
    const box = made("div", `answer ${verdict === null ? "" : verdict ? "right" : "wrong"}`, who);
    box.append(made("p", "text", shown(answer[TEXT], needle)));
    if (whole(answer[NOTE])) box.append(made("p", "quiet", shown(answer[NOTE])));
    for (const text of answer[MORE]) box.append(made("p", "text more", shown(text, needle)));
    if (answer[OPTIONS]) box.append(folded("Options and log-probabilities", () => optionTable(answer[OPTIONS])));
    return box;
  }

  function promptBlock(question) {
    const block = made("div");
    question[PROMPTS].forEach(([head, rest], number) => {
      const readers = pack.models
        .filter((model, n) => question[ANSWERS][n] && question[ANSWERS][n][PROMPT] === number)
        .map(([name]) => name);
      block.append(made("p", "quiet note", `Given to ${readers.join(", ")}:`));
      block.append(made("pre", "", pack.heads[head], shown(rest)));
    });
    return block;
  }

  function card(number, needle) {
    const question = pack.questions[number];
    const head = made("p", "question", made("span", "tag", `${question[ID]}`));
    if (question[KIND]) head.append(made("span", "tag", question[KIND]));
    if (question[OVERLAPS]) head.append(made("span", "tag overlap", "in training text"));
    head.append(shown(question[QUESTION], needle));
    const article = made("article", "", head);
    if (question[TARGET] !== null) {
      const target = made("p", "target", made("span", "quiet", "expected "));
      target.append(shown(question[TARGET], needle));
      article.append(target);
    }
    const boxes = question[ANSWERS].map((answer, n) => answerBox(answer, pack.models[n], needle));
    article.append(made("div", "answers", ...boxes));
    const hasPrompt = question[PROMPTS].some(([head, rest]) => pack.heads[head] || whole(rest));
    if (hasPrompt) article.append(folded("Exact prompt", () => promptBlock(question)));
    return article;
  }

  function turnTo(number) {
    const size = Number(byId("size").value);
    const numPages = Math.max(1, Math.ceil(found.length / size));
    pageNumber = Math.min(Math.max(0, number), numPages - 1);
    const needle = byId("search").value.trim();
    const start = pageNumber * size;
    byId("cards").replaceChildren(...found.slice(start, start + size).map((n) => card(n, needle)));
    const count = (value) => value.toLocaleString("en");
    const of = `of ${count(pack.questions.length)} questions`;
    const range = found.length ? `, ${count(start + 1)}–${count(Math.min(start + size, found.length))} shown` : "";
    const rest = pack.leftOut ? `; ${count(pack.leftOut)} more are in the folder samples only` : "";
    byId("count").textContent = `${count(found.length)} ${of}${range}${rest}`;
    byId("page").value = pageNumber + 1;
    byId("page").max = numPages;
    byId("pages").textContent = `of ${count(numPages)}`;
    byId("previous").disabled = pageNumber === 0;
    byId("next").disabled = pageNumber === numPages - 1;
  }

  // ---------------------------------------------------------------- what the reader does

  function fill(select, labels) {
    const groups = new Map();
    labels.forEach(([group, label], number) => {
      const option = made("option", "", label);
      option.value = number;
      if (!group) return select.append(option);
      if (!groups.has(group)) {
        groups.set(group, made("optgroup"));
        groups.get(group).label = group;
        select.append(groups.get(group));
      }
      groups.get(group).append(option);
    });
  }

  async function choose(number) {
    byId("count").textContent = "Unpacking …";
    try {
      pack = await unpack(number);
    } catch (error) {
      byId("count").textContent = `This browser cannot unpack the answers (${error.message}); they are in the folder samples.`;
      return;
    }
    pack.filters ??= filters();
    byId("show").replaceChildren();
    fill(byId("show"), pack.filters);
    const kinds = [...new Set(pack.questions.map((question) => question[KIND]))].filter(Boolean).sort();
    byId("kinds").hidden = kinds.length < 2;
    byId("kind").replaceChildren(new Option("all", ""), ...kinds.map((kind) => new Option(kind, kind)));
    search();
  }

  let timer = 0;
  byId("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, 120); // milliseconds without a key
  });
  byId("task").addEventListener("change", () => choose(Number(byId("task").value)));
  for (const id of ["show", "kind"]) byId(id).addEventListener("change", search);
  byId("size").addEventListener("change", () => turnTo(0));
  byId("page").addEventListener("change", () => turnTo(Number(byId("page").value) - 1));
  const turn = (by) => {
    turnTo(pageNumber + by);
    byId("browser").scrollIntoView();
  };
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));

  addEventListener("keydown", (event) => {
    const isTyping = event.target.closest?.("input, select, textarea");
    if (event.key === "Escape" && event.target === byId("search")) event.target.blur();
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !pack) return;
    if (event.key === "/") {
      event.preventDefault();
      byId("browser").scrollIntoView();
      byId("search").focus({ preventScroll: true });
    }
    if (event.key === "n") turn(1);
    if (event.key === "p") turn(-1);
  });

  for (const button of document.querySelectorAll("button.browse")) {
    const number = packs.findIndex((item) => item.dataset.task === button.dataset.task);
    button.hidden = number < 0;
    button.addEventListener("click", async () => {
      byId("task").value = number;
      await choose(number);
      byId("browser").scrollIntoView();
      byId("search").focus({ preventScroll: true });
    });
  }
  byId("browsing").hidden = false;
  choose(0);
})();
