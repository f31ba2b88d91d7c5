const at = (id) => document.getElementById(id);
const form = at("ask"), status = at("status"), seen = at("seen"), drop = at("drop");
const examples = [...at("examples").querySelectorAll("button")];
// A data URL, or the promise of one: of an example, or of a file that was chosen or dropped.
let picture = at("picture").getAttribute("src");
let asking = null;

function show(url, pressed, name) {
  at("picture").hidden = false;
  picture = at("picture").src = url;
  at("picture").alt = name;
  examples.forEach((each) => each.setAttribute("aria-pressed", each === pressed));
  at("hint").textContent = pressed ? pressed.dataset.hint : "";
}

function open(file) {
  const reading = (picture = new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => resolve(""); // a folder, say; the server tells what is missing
    reader.readAsDataURL(file);
  }));
  reading.then((url) => {
    if (picture === reading) show(url, null, file.name); // the last one that was opened counts
  });
}

function say(text, refused) {
  status.textContent = text;
  status.className = refused ? "refused" : "";
}

// TIFF, say, which few browsers show; the server reads more.
at("picture").addEventListener("error", () => {
  at("picture").hidden = true;
  at("hint").textContent = `This browser does not show ${at("picture").alt}; the server may read it.`;
});

for (const example of examples)
  example.addEventListener("click", () => {
    show(example.firstElementChild.src, example, "The picture");
    at("question").value = example.dataset.question;
    at("file").value = "";
  });

at("question").addEventListener("input", () => {
  at("hint").textContent = "";
});

at("file").addEventListener("change", (event) => {
  if (event.target.files.length) open(event.target.files[0]);
});

for (const name of ["dragover", "dragleave", "drop"])
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  });

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (asking) asking.abort();
  const own = (asking = new AbortController());
  say("Asking …", false);
  seen.setAttribute("aria-busy", "true");
  let text = "", refusal = "";
  try {
    const asked = { ...Object.fromEntries(new FormData(form)), image: await picture };
    const headers = { "content-type": "application/json" };
    const sent = { method: "POST", headers, body: JSON.stringify(asked), signal: own.signal };
    const answer = await fetch("ask", sent);
    text = await answer.text();
    if (!answer.ok) refusal = JSON.parse(text).error.message;
  } catch (error) {
    refusal = `The server does not answer (${error.message}).`;
  }
  if (own.signal.aborted) return; // the next question is on its way
  seen.removeAttribute("aria-busy");
  seen.innerHTML = refusal ? "" : text;
  say(refusal || seen.firstElementChild.dataset.said, Boolean(refusal));
  // On a narrow screen the answers are below the form, out of sight.
  if (!refusal && seen.getBoundingClientRect().top > innerHeight / 2) seen.scrollIntoView();
});
