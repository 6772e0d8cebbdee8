-- The last turn: takes a supervisor off the registry that has nothing in flight.
-- KEYS[1]  hash, supervisor id -> 'number token gave'    KEYS[2]  hash, supervisor id -> entry
-- KEYS     then three a queue: in flight (hash), head (list), queue (list)
-- ARGV[1]  supervisor id    ARGV[2]  number of this turn    ARGV[3]  token of the turn before
-- Returns 1 if it has left, 0 if something is in flight, nil if it is evicted, which it also is
-- when it has left; the error if it has left and its entry cannot be removed.
local MOST = 1000 -- of a head; each wake-up moved one
local state = redis.call('HGET', KEYS[1], ARGV[1])
if not state then return false end
local last_number, last_token = string.match(state, '^(%d+) (%d+)')
if tonumber(last_number) ~= tonumber(ARGV[2]) - 1 or last_token ~= ARGV[3] then return false end
for i = 3, #KEYS, 3 do
  if redis.call('EXISTS', KEYS[i]) == 1 then return 0 end
end
redis.call('HDEL', KEYS[1], ARGV[1])
local reply = redis.pcall('HDEL', KEYS[2], ARGV[1])
-- Nobody may be left to look there: older releases never do.
for i = 3, #KEYS, 3 do
  for _ = 1, MOST do
    local payload = redis.pcall('LMOVE', KEYS[i + 1], KEYS[i + 2], 'RIGHT', 'LEFT')
    if type(payload) ~= 'string' then break end
  end
end
return type(reply) == 'table' and reply.err or 1
