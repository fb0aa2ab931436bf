// What every page of the site gets: a line below its title from which its notebook can be taken away or run elsewhere.
// Without scripts the page's links to the repository lead there.
const REPOSITORY = "nsq-repro/nsq-repro/blob/main/nbs";

function notebookLinks() {
  const title = document.querySelector("#title-block-header, h1");
  const name = location.pathname.split("/").pop().replace(/\.html$/, "") || "index";
  if (!title || name === "404") return;
  const line = document.createElement("p");
  line.className = "notebook-links";
  line.innerHTML = `This page is a notebook: <a href="https://github.com/${REPOSITORY}/${name}.ipynb?raw=true">download</a>,
    <a href="https://colab.research.google.com/github/${REPOSITORY}/${name}.ipynb">open in Colab</a>`;
  title.after(line);
}

document.addEventListener("DOMContentLoaded", notebookLinks);
