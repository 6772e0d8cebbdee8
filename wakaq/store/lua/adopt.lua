-- The first turn of a new id: takes over what its process holds of an id that is gone.
-- As a turn it happens once, however often it is sent; see turn.lua. It claims nothing.
--
-- KEYS[1]  hash, supervisor id -> 'number token gave'      KEYS[2]  hash, supervisor id -> entry
-- KEYS     then three a queue: in flight of the old id (hash), of the new one (hash), queue (list)
-- ARGV[1]  the new id                      ARGV[2]  number of this turn
-- ARGV[3]  token of its registration       ARGV[4]  the old id
-- ARGV[5]  the new number of the first payload; each next one has the next number, found or not
-- ARGV[6]  '1' to put the rest of the old id's payloads back to the front of their queues; '0' for
--          an orphan, which is not the only one that holds some: rescue does it then
-- ARGV     then for each queue: how many numbers, and the old numbers
-- Returns nil if it is evicted, else a list: the token, then new number and payload of each that
-- was found.
local new_id, number, token, old_id = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local base, takes_rest = tonumber(ARGV[5]), ARGV[6] == '1'

local state = redis.call('HGET', KEYS[1], new_id)
if not state then return false end
local last_number, last_token = string.match(state, '^(%d+) (%d+)')
local is_repeated = last_number == number
if not is_repeated and (tonumber(last_number) ~= tonumber(number) - 1 or last_token ~= token) then
  return false
end

local found = {}
-- Moves payloads to the new hash, or reads there what was moved before; returns the position behind
-- them.
local function adopt(old, new, at, n, position)
  for i = 0, n - 1 do
    local new_number = base + position + i
    local key, number_there = old, ARGV[at + i]
    if is_repeated then key, number_there = new, new_number end
    local payload = redis.pcall('HGET', key, number_there)
    if type(payload) == 'string' then
      local reply = is_repeated or redis.pcall('HSET', new, new_number, payload)
      if type(reply) ~= 'table' then
        if not is_repeated then redis.call('HDEL', old, ARGV[at + i]) end
        found[#found + 1] = new_number
        found[#found + 1] = payload
      end
    end
  end
  return position + n
end

-- Puts what is left back to the front of its queue, the lowest number foremost; returns whether
-- nothing is left.
local function put_back(old, queue)
  local numbers = redis.pcall('HKEYS', old)
  if numbers.err then return false end
  table.sort(numbers, function(a, b) return tonumber(a) > tonumber(b) end)
  for _, old_number in ipairs(numbers) do
    local reply = redis.pcall('LPUSH', queue, redis.call('HGET', old, old_number))
    if type(reply) == 'table' then return false end
    redis.call('HDEL', old, old_number)
  end
  return true
end

local function execute()
  local at, position, is_empty = 7, 0, true
  for i = 3, #KEYS, 3 do
    local n = tonumber(ARGV[at])
    position = adopt(KEYS[i], KEYS[i + 1], at + 1, n, position)
    at = at + 1 + n
    if takes_rest and not is_repeated then
      is_empty = put_back(KEYS[i], KEYS[i + 2]) and is_empty
    end
  end
  -- The entry tells rescuers where to look, so it stays while there is something.
  if takes_rest and is_empty and not is_repeated then redis.pcall('HDEL', KEYS[2], old_id) end
end

if is_repeated then
  token = last_token
  execute()
else
  redis.call('HDEL', KEYS[1], old_id) -- a write that frees memory comes first, see turn.lua
  local now = redis.call('TIME')
  token = string.format('%d%06d', now[1], now[2])
  redis.call('HSET', KEYS[1], new_id, number .. ' ' .. token)
  local is_executed, err = pcall(execute)
  if not is_executed then
    redis.call('HDEL', KEYS[1], new_id)
    return redis.error_reply(type(err) == 'table' and err.err or tostring(err))
  end
end
table.insert(found, 1, token)
return found
