// The table of all tasks: search, sort, pagination. Model output is only inserted as textContent, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const count = data.instruction.length;
const ROWS_PER_PAGE = 50;
const COLLAPSED_LENGTH = 260; // characters of a text in a collapsed row

let order = [...data.instruction.keys()]; // indices of all tasks, in sort order
let matches = order; // indices of the tasks that match the search
let page = 0;
let texts = null; // lowercase text of each task, built at the first search

function text(index) {
  texts ??= data.instruction.map((_, i) => `${data.instruction[i]}\n${data.input[i]}\n${data.output[i]}`.toLowerCase());
  return texts[index];
}

// ---- search

// `write "a short story" verb:list` -> predicates that a task must all satisfy
function predicates(query) {
  const parts = query.toLowerCase().matchAll(/(?:(verb|noun):)?(?:"([^"]*)"?|([^\s"]+))/g);
  return [...parts].map(([, column, quoted, word]) => {
    const term = quoted ?? word;
    return column ? (index) => data[column][index] === term : (index) => text(index).includes(term);
  });
}

function search() {
  const tests = predicates($("search").value);
  matches = tests.length ? order.filter((index) => tests.every((test) => test(index))) : order;
  page = 0;
  show();
}

let timer = 0; // debounces the search
$("search").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(search, 150);
});
$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(timer);
  search();
});

// A link to #q=... runs a search; the sunburst uses such links.
function searchHash() {
  const query = new URLSearchParams(location.hash.slice(1)).get("q");
  if (query === null) return;
  $("search").value = query;
  search();
  $("tasks").scrollIntoView();
  $("search").focus({ preventScroll: true });
}
addEventListener("hashchange", searchHash);

// ---- sort

for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => {
    const [head, column] = [button.closest("th"), data[button.dataset.sort]];
    const descending = head.getAttribute("aria-sort") !== "descending";
    for (const other of document.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    order = [...order.keys()].sort((a, b) => (descending ? column[b] - column[a] : column[a] - column[b]) || a - b);
    search();
  });
}

// ---- the rows of a page

function element(tag, className, content = "", role = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (role) node.setAttribute("role", role);
  node.textContent = content;
  return node;
}

function labelled(name, content) {
  const line = element("p", "part");
  line.append(element("b", "", name), " ", element("span", "text", content));
  return line;
}

function fill(row, index, open) {
  const truncate = (content) => (open || content.length <= COLLAPSED_LENGTH ? content : content.slice(0, COLLAPSED_LENGTH).trimEnd() + "…");
  const near = data.nearest[index];
  const nearest = near < 0 ? data.others[-1 - near] : data.instruction[near];
  const toggle = element("button", "toggle");
  toggle.type = "button";
  toggle.setAttribute("aria-expanded", String(open));
  toggle.setAttribute("aria-label", `Task ${index + 1} in full`);
  const task = element("td", "task", "", "cell");
  task.append(toggle, element("span", "text", truncate(data.instruction[index])));
  if (data.input[index]) task.append(labelled("Input", truncate(data.input[index])));
  if (open && nearest) task.append(labelled("Nearest", nearest));
  const output = element("td", "output", "", "cell");
  output.append(element("span", "text", truncate(data.output[index])));
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
  const last = Math.max(1, Math.ceil(matches.length / ROWS_PER_PAGE));
  page = Math.min(Math.max(0, page), last - 1);
  const rows = matches.slice(page * ROWS_PER_PAGE, (page + 1) * ROWS_PER_PAGE).map((index) => {
    const row = element("tr", "", "", "row");
    row.dataset.index = index;
    fill(row, index, false);
    return row;
  });
  document.querySelector("#table tbody").replaceChildren(...rows);
  const number = (value) => value.toLocaleString("en");
  $("status").textContent = `${number(matches.length)} of ${number(count)} tasks`;
  $("last").textContent = number(last);
  $("page").value = page + 1;
  $("page").max = last;
  $("previous").disabled = page === 0;
  $("next").disabled = page === last - 1;
  $("pages").hidden = last === 1;
}

function goToPage(number) {
  page = number;
  show();
  $("table").scrollIntoView();
}
$("previous").addEventListener("click", () => goToPage(page - 1));
$("next").addEventListener("click", () => goToPage(page + 1));
$("page").addEventListener("change", () => goToPage(Math.trunc(Number($("page").value) || 1) - 1));

document.querySelector("#table tbody").addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (!event.target.closest("button") && !getSelection().isCollapsed) return; // the user is selecting text
  const focused = row.contains(document.activeElement);
  fill(row, Number(row.dataset.index), !row.classList.contains("open"));
  if (focused) row.querySelector("button").focus();
});

show();
searchHash();
