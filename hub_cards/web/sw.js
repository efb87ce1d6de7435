// Keeps every file of the page, so that it opens without a network after the first visit.

// Publishing puts the digest of all files here: another one begins a new store.
const VERSION = "unpublished";
// Other pages of the same origin have stores of their own.
const STORES = `rs-transformer-${registration.scope}-`;
const STORE = STORES + VERSION;
const SHELL = ["./", "index.html", "app.js", "sentences.js", "worker.js", "style.css", "models.json"];

addEventListener("install", (event) => {
  event.waitUntil(
    caches
      .open(STORE)
      // Past the browser's own cache, which may still have the files of the page before.
      .then((store) => store.addAll(SHELL.map((url) => new Request(url, { cache: "reload" }))))
      .then(() => skipWaiting()),
  );
});

addEventListener("activate", (event) => {
  event.waitUntil(
    caches
      .keys()
      .then((names) => Promise.all(names.filter((name) => name.startsWith(STORES) && name !== STORE).map((name) => caches.delete(name))))
      .then(() => clients.claim()),
  );
});

async function answer(event) {
  const { request } = event;
  const store = await caches.open(STORE);
  const kept = await store.match(request, { ignoreSearch: true });
  if (kept) return kept;
  // What the browser's own cache has, may be a file of the page before: it is asked if it is still the same.
  const fetched = await fetch(request, { cache: "no-cache" });
  // Meanwhile the page reads on; where the store is full, it works all the same.
  if (fetched.ok) event.waitUntil(store.put(request, fetched.clone()).catch(() => {}));
  return fetched;
}

addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === location.origin) event.respondWith(answer(event));
});
