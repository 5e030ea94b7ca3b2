// Markdown -> DOM nodes. Text only ever becomes text nodes: there is no way from a model's answer
// to markup, an image, a style or a script. Links go to http, https and mailto, and nowhere else.

const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const MAX_FORMATTED = 4000; // characters of one paragraph: longer ones are shown as they are
const INLINE =
  /(`+)([\s\S]*?[^`])\1(?!`)|\*\*([^\s*](?:[\s\S]*?[^\s])?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*|~~(\S(?:[\s\S]*?\S)?)~~|\[([^\]]*)\]\(([^\s()]+)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])/;

/** An element with attributes and children; strings become text nodes. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

function link(text, target) {
  if (!SAFE_LINK.test(target)) return document.createTextNode(`${text} (${target})`);
  return make("a", { href: target, target: "_blank", rel: "noopener noreferrer" }, text);
}

function inline(text, depth = 0) {
  const nodes = [];
  while (text) {
    const found = depth < 6 && text.length < MAX_FORMATTED ? INLINE.exec(text) : null;
    if (!found) {
      nodes.push(document.createTextNode(text));
      break;
    }
    if (found.index) nodes.push(document.createTextNode(text.slice(0, found.index)));
    const [all, , code, bold, italic, struck, label, target, url] = found;
    if (code !== undefined) nodes.push(make("code", {}, code));
    else if (bold !== undefined) nodes.push(make("strong", {}, ...inline(bold, depth + 1)));
    else if (italic !== undefined) nodes.push(make("em", {}, ...inline(italic, depth + 1)));
    else if (struck !== undefined) nodes.push(make("s", {}, ...inline(struck, depth + 1)));
    else if (url !== undefined) nodes.push(link(url, url));
    else nodes.push(link(label, target));
    text = text.slice(found.index + all.length);
  }
  return nodes;
}

function codeBlock(language, code) {
  const button = make("button", { type: "button", "aria-label": "Copy this code" }, "Copy");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code);
    button.textContent = "Copied";
  });
  const head = make("div", {}, make("span", {}, language || "text"), button);
  return make("div", { class: "code" }, head, make("pre", { tabindex: "0" }, make("code", {}, code)));
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

/** The nodes of a whole text, which may end in the middle of anything. */
export function markdown(text) {
  const lines = text.split("\n");
  const nodes = [];
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) nodes.push(make("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let at = 0; at < lines.length; at++) {
    const line = lines[at];
    let found;
    if ((found = /^\s*(```+|~~~+)\s*([\w+#.-]*)/.exec(line))) {
      flush();
      const code = [];
      for (at++; at < lines.length && !lines[at].trim().startsWith(found[1]); at++) code.push(lines[at]);
      nodes.push(codeBlock(found[2], code.join("\n")));
    } else if ((found = /^(#{1,6})\s+(.*)$/.exec(line))) {
      flush();
      nodes.push(make(`h${Math.min(found[1].length + 2, 5)}`, {}, ...inline(found[2])));
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      flush();
      nodes.push(make("hr"));
    } else if (/^\s*>/.test(line)) {
      flush();
      const quoted = [];
      for (; at < lines.length && /^\s*>/.test(lines[at]); at++) quoted.push(lines[at].replace(/^\s*> ?/, ""));
      at--;
      nodes.push(make("blockquote", {}, ...inline(quoted.join("\n"))));
    } else if (/^\s*([-*+]|\d{1,9}[.)])\s+/.test(line)) {
      flush();
      const isOrdered = /^\s*\d/.test(line);
      const list = make(isOrdered ? "ol" : "ul", isOrdered ? { start: parseInt(line, 10) } : {});
      for (; at < lines.length; at++) {
        found = /^\s*([-*+]|\d{1,9}[.)])\s+(.*)$/.exec(lines[at]);
        if (found) list.append(make("li", {}, ...inline(found[2])));
        else if (/^\s+\S/.test(lines[at])) list.lastChild.append("\n", ...inline(lines[at].trim()));
        else break;
      }
      at--;
      nodes.push(list);
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] ?? "")) {
      flush();
      const row = (kind, source) => make("tr", {}, ...cells(source).map((cell) => make(kind, {}, ...inline(cell))));
      const table = make("table", {}, row("th", line));
      for (at += 2; at < lines.length && lines[at].includes("|"); at++) table.append(row("td", lines[at]));
      at--;
      nodes.push(table);
    } else if (line.trim() === "") flush();
    else paragraph.push(line);
  }
  flush();
  return nodes;
}
