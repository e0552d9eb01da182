// Conversations and their pictures, kept in this browser's IndexedDB, or in memory where there is
// none (private windows of some browsers). Pictures lie apart: the list is read without them.

const CONVERSATIONS = "conversations";
const PICTURES = "pictures";

const memory = { [CONVERSATIONS]: new Map(), [PICTURES]: new Map() };
let database = null;

// True if what is written here is still there when the page is opened again.
export async function openStore() {
  try {
    database = await opened();
  } catch {
    database = null;
  }
  return database !== null;
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("glimt", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
      request.result.createObjectStore(PICTURES, { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(request.error);
  });
}

function run(store, mode, action) {
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(store, mode);
    const request = action(transaction.objectStore(store));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

async function put(store, record) {
  if (!database) memory[store].set(record.id, record);
  else await run(store, "readwrite", (objects) => objects.put(record));
}

async function get(store, id) {
  return database ? run(store, "readonly", (objects) => objects.get(id)) : memory[store].get(id);
}

async function remove(store, id) {
  if (!database) memory[store].delete(id);
  else await run(store, "readwrite", (objects) => objects.delete(id));
}

// --- conversations: {id, title, updated, turns} ---------------------------------------------------

// Newest first.
export async function listConversations() {
  const all = database
    ? await run(CONVERSATIONS, "readonly", (objects) => objects.getAll())
    : [...memory[CONVERSATIONS].values()];
  return all.sort((one, other) => other.updated - one.updated);
}

export const loadConversation = (id) => get(CONVERSATIONS, id);
export const saveConversation = (conversation) => put(CONVERSATIONS, structuredClone(conversation));
export const removeConversation = (id) => remove(CONVERSATIONS, id);

// --- pictures: {id, name, width, height, blob} ----------------------------------------------------

export const savePicture = (picture) => put(PICTURES, picture);
export const loadPicture = (id) => get(PICTURES, id);

export const picturesOf = (turns) => turns.flatMap((turn) => turn.pictures ?? []);

export async function removePictures(turns) {
  await Promise.all(picturesOf(turns).map(({ id }) => remove(PICTURES, id)));
}
