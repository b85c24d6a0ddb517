// The table of all tasks: searched, sorted, a page at a time. What a model wrote is only ever set as text.
"use strict";

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const count = data.instruction.length;
const ROWS = 50;
const SHORT = 260; // characters of a text in a closed row

let order = [...data.instruction.keys()]; // all tasks, as they are sorted
let found = order; // those of them that are searched for
let page = 0;
let texts = null; // what is searched in, made when first needed

function text(index) {
  texts ??= data.instruction.map((_, i) => `${data.instruction[i]}\n${data.input[i]}\n${data.output[i]}`.toLowerCase());
  return texts[index];
}

// ---- search

// `write "a short story" verb:list` -> the conditions a task must meet
function conditions(query) {
  const parts = query.toLowerCase().matchAll(/(?:(verb|noun):)?(?:"([^"]*)"?|([^\s"]+))/g);
  return [...parts].map(([, column, quoted, word]) => {
    const wanted = quoted ?? word;
    return column ? (index) => data[column][index] === wanted : (index) => text(index).includes(wanted);
  });
}

function search() {
  const wanted = conditions($("search").value);
  found = wanted.length ? order.filter((index) => wanted.every((meets) => meets(index))) : order;
  page = 0;
  show();
}

let waiting = 0;
$("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(search, 150);
});
$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(waiting);
  search();
});

// A link to #q=... searches, from the sunburst or from outside.
function searchHash() {
  const query = new URLSearchParams(location.hash.slice(1)).get("q");
  if (query === null) return;
  $("search").value = query;
  search();
  $("tasks").scrollIntoView();
  $("search").focus({ preventScroll: true });
}
addEventListener("hashchange", searchHash);

// ---- order

for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => {
    const [head, column] = [button.closest("th"), data[button.dataset.sort]];
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of document.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    order = [...order.keys()].sort((a, b) => (down ? column[b] - column[a] : column[a] - column[b]) || a - b);
    search();
  });
}

// ---- the rows of a page

function element(tag, className, content = "", role = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (role) made.setAttribute("role", role);
  made.textContent = content;
  return made;
}

function labelled(name, content) {
  const line = element("p", "part");
  line.append(element("b", "", name), " ", element("span", "text", content));
  return line;
}

function fill(row, index, open) {
  const cut = (content) => (open || content.length <= SHORT ? content : content.slice(0, SHORT).trimEnd() + "…");
  const near = data.nearest[index];
  const nearest = near < 0 ? data.others[-1 - near] : data.instruction[near];
  const toggle = element("button", "toggle");
  toggle.type = "button";
  toggle.setAttribute("aria-expanded", String(open));
  toggle.setAttribute("aria-label", `Task ${index + 1} in full`);
  const task = element("td", "task", "", "cell");
  task.append(toggle, element("span", "text", cut(data.instruction[index])));
  if (data.input[index]) task.append(labelled("Input", cut(data.input[index])));
  if (open && nearest) task.append(labelled("Nearest", nearest));
  const output = element("td", "output", "", "cell");
  output.append(element("span", "text", cut(data.output[index])));
  const number = (name, value) => {
    const cell = element("td", "number", value, "cell");
    cell.dataset.name = name;
    return cell;
  };
  row.classList.toggle("open", open);
  row.replaceChildren(
    task,
    output,
    number("words", data.words[index].toLocaleString("en")),
    number("ROUGE-L", data.score[index].toFixed(2)),
    number("request", data.request[index].toLocaleString("en")),
  );
}

function show() {
  const last = Math.max(1, Math.ceil(found.length / ROWS));
  page = Math.min(Math.max(0, page), last - 1);
  const rows = found.slice(page * ROWS, (page + 1) * ROWS).map((index) => {
    const row = element("tr", "", "", "row");
    row.dataset.index = index;
    fill(row, index, false);
    return row;
  });
  document.querySelector("#table tbody").replaceChildren(...rows);
  const number = (value) => value.toLocaleString("en");
  $("status").textContent = `${number(found.length)} of ${number(count)} tasks`;
  $("last").textContent = number(last);
  $("page").value = page + 1;
  $("page").max = last;
  $("previous").disabled = page === 0;
  $("next").disabled = page === last - 1;
  $("pages").hidden = last === 1;
}

function turn(to) {
  page = to;
  show();
  $("table").scrollIntoView();
}
$("previous").addEventListener("click", () => turn(page - 1));
$("next").addEventListener("click", () => turn(page + 1));
$("page").addEventListener("change", () => turn(Math.trunc(Number($("page").value) || 1) - 1));

document.querySelector("#table tbody").addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (!event.target.closest("button") && !getSelection().isCollapsed) return; // somebody selects text
  const focused = row.contains(document.activeElement);
  fill(row, Number(row.dataset.index), !row.classList.contains("open"));
  if (focused) row.querySelector("button").focus();
});

show();
searchHash();
