// The table of claims, filtered by the paper's page, by verdict and by words. Without scripts the whole table stands there.

// The paper's page and the verdict of a row, from the texts of its cells.
const pageOf = (where) => (where.match(/^p\.\s*(\d+)/) || [])[1] || "";
const verdictOf = (text) => text.replace(/\s*\(.*$/s, "").trim();

function filterClaims(table) {
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const [where, verdict] = [heads.indexOf("where"), heads.indexOf("verdict")];
  const rows = [...table.tBodies[0].rows].map((row) => ({
    row, page: pageOf(row.cells[where].textContent), verdict: verdictOf(row.cells[verdict].textContent),
  }));
  for (const { row } of rows) [...row.cells].forEach((cell, i) => { cell.dataset.head = heads[i]; });
  const box = document.createElement("div");
  box.className = "claims-filter";
  const choose = (name, label) => {
    const values = [...new Set(rows.map((r) => r[name]))];
    if (name === "page") values.sort((a, b) => a - b);
    const options = values.map((v) => `<option>${v}</option>`).join("");
    return `<label for="claims-${name}">${label} <select id="claims-${name}"><option value="">all</option>${options}</select></label>`;
  };
  box.innerHTML = `${choose("page", "page")} ${choose("verdict", "verdict")}
    <label for="claims-words">words or number <input type="search" id="claims-words"></label> <output aria-live="polite"></output>`;
  table.before(box);
  const draw = () => {
    const [page, wanted, words] = ["page", "verdict", "words"].map((name) => box.querySelector(`#claims-${name}`).value);
    for (const r of rows) {
      const said = r.row.textContent.toLowerCase().includes(words.trim().toLowerCase());
      r.row.hidden = !said || (page && r.page !== page) || (wanted && r.verdict !== wanted);
    }
    box.querySelector("output").textContent = `${rows.filter((r) => !r.row.hidden).length} of ${rows.length} claims`;
  };
  box.addEventListener("input", draw);
  draw();
}

function start() {
  for (const table of document.querySelectorAll("table")) {
    const heads = [...(table.tHead?.rows[0]?.cells || [])].map((cell) => cell.textContent.trim());
    if (["where", "what the paper says", "verdict"].every((head) => heads.includes(head))) return filterClaims(table);
  }
}

if (typeof document === "undefined") module.exports = { pageOf, verdictOf };
else if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();
